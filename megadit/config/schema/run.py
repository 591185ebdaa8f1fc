"""``RunConfig``: every section of a training run. Hyperparameters are in base (width-independent) units."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megadit.config.family import family_spec
from megadit.config.schema.data import DataConfig
from megadit.config.schema.float8 import Float8Config, float8_problem
from megadit.config.schema.kernels import LARGEST_FLASH_HEAD_DIM, KernelConfig
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.optim import OptimConfig
from megadit.config.schema.parallel import ParallelConfig, layout_problem
from megadit.config.schema.registered import Plugins
from megadit.config.schema.section import Section
from megadit.config.schema.values import parse_number
from megadit.extensions import CALLBACKS


class ObjectiveConfig(Section):
    """What the model predicts, and how timesteps are sampled and weighted."""

    kind: Literal["ddpm", "flow"] = Field(
        "ddpm", description="ddpm: noise prediction on a discrete schedule; flow: flow matching, predicts noise - x0"
    )
    prediction: Literal["eps", "v"] = Field("eps", description="ddpm: noise or v; flow predicts noise - x0")
    diffusion_steps: int = Field(1000, ge=2, description="ddpm: number of timesteps")
    beta_schedule: Literal["linear", "scaled_linear"] = Field(
        "linear",
        description="ddpm: linear: betas from 1e-4 to 2e-2; scaled_linear: from 0.00085 to 0.012, linear in the "
        "square root, as for the latents of Stable Diffusion and U-ViT",
    )
    time_sampling: Literal["uniform", "logit_normal"] = Field("uniform", description="flow: distribution of timesteps")
    logit_mean: float = Field(0.0, description="logit_normal: mean of logit(t)")
    logit_std: float = Field(1.0, gt=0, description="logit_normal: standard deviation of logit(t)")
    shift: float = Field(1.0, gt=0, description="flow: resolution shift t' = s t / (1 + (s - 1) t)")
    weighting: Literal["none", "min_snr"] = Field("none", description="ddpm: loss weight by timestep")
    min_snr_gamma: float = Field(5.0, gt=0, description="min_snr: cap of the signal-to-noise ratio")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="probability of dropping a sample's class or text, for classifier-free guidance"
    )
    repa_weight: float = Field(
        0.0, ge=0, description="weight of the REPA loss (needs model.repa and data.features); 0: none"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.kind == "flow" and self.prediction != "eps":
            raise ValueError("prediction: v belongs to kind ddpm; flow always predicts noise - x0, so leave it out")
        if self.kind == "flow" and self.weighting != "none":
            raise ValueError("weighting: min_snr belongs to kind ddpm; set weighting to none for flow")
        if self.kind == "flow" and self.beta_schedule != "linear":
            raise ValueError(f"beta_schedule: {self.beta_schedule} belongs to kind ddpm; leave it out")
        if self.kind == "ddpm" and (self.time_sampling != "uniform" or self.shift != 1.0):
            key, value = ("shift", self.shift) if self.shift != 1.0 else ("time_sampling", self.time_sampling)
            raise ValueError(f"{key}: {value} belongs to kind flow; ddpm draws timesteps uniformly, so leave it out")
        return self


ONLINE = "online"  # name of the trained weights, beside those of the moving averages


def _weights_name(value: Any) -> Any:
    """The name of an average by its decay in any notation: 0.99990 is "0.9999"."""
    decay = parse_number(value) if isinstance(value, str) else value
    return repr(decay) if isinstance(decay, float) else value


WeightsName = Annotated[str, BeforeValidator(_weights_name)]


class EmaConfig(Section):
    """Moving averages of the weights; none by default. Each takes as much memory as the float32 master weights."""

    decays: tuple[float, ...] = Field((), description="constant decays, such as 0.9999, which is the average's name")
    sigma_rels: tuple[float, ...] = Field(
        (), description="relative widths of EDM2 power profiles, such as 0.05, named sigma-0.05"
    )
    every: int = Field(1, ge=1, description="update at every k-th optimizer step, with the decay of k steps")

    @property
    def constant_decays(self) -> dict[str, float]:
        """Decay by name."""
        return {repr(decay): decay for decay in self.decays}

    @property
    def power_profiles(self) -> dict[str, float]:
        """Relative width by name."""
        return {f"sigma-{sigma!r}": sigma for sigma in self.sigma_rels}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all averages, as ``sample.weights`` and ``launch/sample.py --ema`` take them."""
        return (*self.constant_decays, *self.power_profiles)

    @model_validator(mode="after")
    def _consistent(self) -> EmaConfig:
        for decay in self.decays:
            if not 0 < decay < 1:
                raise ValueError(f"decays: {decay} does not lie between 0 and 1; the usual is 0.9999")
        for sigma in self.sigma_rels:
            if not 0 < sigma < 12**-0.5:  # of the uniform average; wider profiles would favour the beginning
                raise ValueError(f"sigma_rels: {sigma} does not lie between 0 and 0.2886; EDM2 uses 0.05 and 0.1")
        for key, values in (("decays", self.decays), ("sigma_rels", self.sigma_rels)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {list(values)} names an average twice; leave one out")
        return self


class TrainConfig(Section):
    """Length, batch size, precision and output of the run; intervals are in optimizer steps."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="epochs of the training set, instead of steps")
    global_batch: int = Field(256, ge=1, description="images per optimizer step, over all ranks")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="images per forward pass and replica; default: global_batch / replicas, in a pipeline 4 micro "
        "batches per stage",
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        "fp32",
        description="of forward and backward; masters are fp32. fp8: bf16, with the matrix products of the blocks' "
        "linear layers in FP8",
    )
    fp8: Float8Config = Float8Config()
    tf32: bool | Literal["auto"] = Field(
        "auto",
        description="float32 products of matrices in TF32 on a GPU: auto: where precision is fp32; true and false: "
        "convolutions too",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="recompute in the backward pass: selective: all but matrix products and attention; full: all "
        "of a block",
    )
    compile: bool = Field(False, description="torch.compile the blocks; takes minutes at the start")
    seed: int = Field(0, ge=0, description="seed of initialization, data order, noise and label dropout")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int | None = Field(None, ge=1, description="default: at the end only")
    keep_last: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    keep_every: int | None = Field(
        None,
        ge=1,
        description="keep checkpoints at multiples of this for good; a multiple of checkpoint_every",
    )
    init_from: str | None = Field(
        None, description="checkpoint or run directory from which a new run takes the initial weights, and nothing else"
    )
    init_from_ema: WeightsName | None = Field(
        None, description="init_from: use the weights of this average; null: the online ones"
    )
    skip_samples: tuple[tuple[int, int], ...] = Field(
        (), description="windows [first, stop) of global sample numbers to skip; other samples keep image and noise"
    )
    sample_every: int | None = Field(None, ge=1, description="default: at the end only")
    validate_every: int | None = Field(None, ge=1, description="default: at the end only")
    validation_images: int = Field(256, ge=0, description="images of the validation loss; 0: no validation loss")
    validate_with: tuple[WeightsName, ...] = Field(
        (ONLINE,), description="weights to validate: online, and names of averages (see ema)"
    )
    tensorboard: bool = Field(True, description="write TensorBoard scalars and sample grids")
    wandb: bool = Field(False, description="log to Weights & Biases too, if installed")
    callbacks: tuple[str, ...] = Field(
        (), description="callbacks of plugins, by name, run after megadit's own (docs/extending.md)"
    )

    @property
    def weights_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Type of weights, activations and gradients: bf16 under fp8 too."""
        return "bf16" if self.precision == "fp8" else self.precision

    @field_validator("skip_samples", mode="before")
    @classmethod
    def _windows(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2 and all(type(entry) is int for entry in value):
            shown = f"[{value[0]}, {value[1]}]"
            raise ValueError(f"skip_samples: {shown} is one window and not a list of them; write [{shown}]")
        if not isinstance(value, list | tuple):
            return value
        return tuple(tuple(window) if isinstance(window, list) else window for window in value)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: is missing; give the run's length as steps or as epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps: {self.steps} and epochs {self.epochs} both say how long to train; give one of them"
            )
        if self.keep_every is not None and self.keep_every % (self.checkpoint_every or self.keep_every + 1):
            raise ValueError(
                f"keep_every: {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}, so that "
                "nothing would be kept; make it one"
            )
        added = CALLBACKS.added()
        for name in self.callbacks:
            if name not in added:
                problem = "always runs; leave it out" if name in CALLBACKS else "is no callback of a plugin"
                remedy = (
                    "" if name in CALLBACKS else f" ({', '.join(added) or 'none is imported'}); give --plugins MODULE"
                )
                raise ValueError(f"callbacks: {name!r} {problem}{remedy}")
        if len(set(self.callbacks)) < len(self.callbacks):
            raise ValueError(f"callbacks: {list(self.callbacks)} names one twice; leave one out")
        for first, stop in self.skip_samples:
            if not 0 <= first < stop:
                raise ValueError(
                    f"skip_samples: [{first}, {stop}] is no window: it leaves out the sample numbers from the first up "
                    "to, but without, the second; write e.g. [[9216, 9472]]"
                )
        windows = sorted(self.skip_samples)
        for (first, stop), (other, end) in itertools.pairwise(windows):
            if other < stop:
                raise ValueError(
                    f"skip_samples: [{first}, {stop}] and [{other}, {end}] overlap; write [{first}, {max(stop, end)}]"
                )
        if self.init_from_ema is not None and self.init_from is None:
            raise ValueError(
                f"init_from_ema: {self.init_from_ema} is an average of the checkpoint init_from, which is not given; "
                "give it, or leave this out"
            )
        return self


class SampleConfig(Section):
    """How images are sampled from the model, during training and by launch/sample.py."""

    scheduler: Literal["auto", "ddpm", "ddim", "dpm", "euler"] = Field(
        "auto", description="auto: dpm for ddpm-trained models, euler for flow"
    )
    steps: int = Field(50, ge=1, description="sampler steps per image; each is two model evaluations with guidance")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance scale; 1 is off")
    guidance_channels: int | None = Field(None, ge=1, description="guide the first k channels only (DiT: 3)")
    count: int = Field(64, ge=1, description="images per grid")
    seed: int = Field(0, ge=0, description="seed of the initial noise")
    weights: WeightsName = Field(ONLINE, description="online, or the name of an average (see ema)")
    prompts: tuple[str, ...] = Field((), description="prompts, used in turn; default: held-out captions of the data")


class RunConfig(Section):
    """The configuration of a run; saved with every key as ``config.yaml`` in its run directory."""

    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
    plugins: Plugins = Field(
        (),
        description="modules to import first, which register families, data sources, callbacks, …: docs/extending.md",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        problems = (
            self._objective_problem(),
            self._size_problem(),
            self._class_problem(),
            self._text_problem(),
            self._repa_problem(),
            self._stage_problem(),
            self._attention_problem(),
            layout_problem(self.parallel, self.model),
            self._weights_problem(),
            self._float8_problem(),
        )
        for problem in problems:
            if problem:
                raise ValueError(problem)
        return self

    def _objective_problem(self) -> str | None:
        if self.objective.kind == "flow" and self.model.learn_sigma:
            return (
                "model.learn_sigma: true does not go with objective.kind flow, whose velocity has no variance; "
                "set model.learn_sigma=false"
            )
        guided = self.sample.guidance_channels
        if guided is not None and guided > self.model.in_channels:
            return (
                f"sample.guidance_channels: {guided} is more than model.in_channels {self.model.in_channels}; lower it"
            )
        return None

    def _size_problem(self) -> str | None:
        size, factor = self.data.image_size, self.data.vae.factor if self.data.vae is not None else 1
        if size is None or size == factor * self.model.input_size:
            return None
        kind = "images" if factor == 1 else f"latents, {factor} image pixels each,"
        return (
            f"data.image_size: {size}, but model.input_size {self.model.input_size} is for {kind} of "
            f"{factor * self.model.input_size} pixels; make the two agree"
        )

    def _class_problem(self) -> str | None:
        classes, condition = self.model.num_classes, self.data.condition
        if condition != "class" and classes:
            return f"model.num_classes: {classes}, but data.condition is {condition}; set model.num_classes=0"
        if condition == "class" and not classes:
            return (
                "model.num_classes: 0, but data.condition is class; set the number of classes, or data.condition=none"
            )
        if condition == "none" and self.sample.guidance != 1.0:
            return f"sample.guidance: {self.sample.guidance} needs classes or texts; set sample.guidance=1"
        return None

    def _text_problem(self) -> str | None:
        if self.data.condition == "text" and self.model.text is None:
            return (
                f"data.condition: text, but model.text is not given, so that this {self.model.family} takes no text; "
                "set model.text.dim, or another data.condition"
            )
        if self.data.condition != "text" and self.model.text is not None:
            return f"data.condition: {self.data.condition}, but the model takes text; set it to text"
        if self.sample.prompts and self.model.text is None:
            return f"sample.prompts: {list(self.sample.prompts)[:1]} need a model with model.text; leave them out"
        return None

    def _repa_problem(self) -> str | None:
        weight = self.objective.repa_weight
        if weight and self.model.repa is None:
            return f"objective.repa_weight: {weight}, but the model has no projector; set model.repa.block, or 0"
        if weight and self.data.features is None:
            return f"objective.repa_weight: {weight}, but there are no target features; set data.features.encoder, or 0"
        if not weight and self.model.repa is not None:
            return (
                "objective.repa_weight: 0, but the model has a projector, which nothing would train; set a weight, or "
                "model.repa=null"
            )
        return None

    def _stage_problem(self) -> str | None:
        if self.train.precision == "fp32" or self.parallel.zero_stage != 0:
            return None
        return (
            f"parallel.zero_stage: 0 does not go with train.precision {self.train.precision}, where "
            "DeepSpeed would start Adam at step 1; set parallel.zero_stage=1"
        )

    def _float8_problem(self) -> str | None:
        train, parallel = self.train, self.parallel
        if train.precision != "fp8":
            return None
        return float8_problem(train.fp8, tensor=parallel.tensor, compiled=train.compile, zero_stage=parallel.zero_stage)

    def _attention_problem(self) -> str | None:
        choice, model = self.kernels.attention, self.model
        if choice not in ("varlen", "flash-attn"):
            return None
        remedy = "set kernels.attention=auto"
        if self.train.precision == "fp32":
            return f"kernels.attention: {choice} needs bf16 or fp16; set train.precision=bf16, or {remedy[4:]}"
        if model.head_channels > LARGEST_FLASH_HEAD_DIM:
            return (
                f"kernels.attention: {choice} takes heads of at most {LARGEST_FLASH_HEAD_DIM} channels, but this "
                f"model's have {model.head_channels}; {remedy}"
            )
        text_keys = family_spec(model.family).text_keys
        if model.attention_precision == "fp32" and text_keys != "cross":
            return f"kernels.attention: {choice} does not go with model.attention_precision fp32; {remedy}"
        if choice == "varlen" and (model.text is None or not model.text.mask or not text_keys):
            return (
                "kernels.attention: varlen leaves out the padding of texts by their lengths, which this "
                f"{model.family} does not; {remedy}"
            )
        return None

    def _weights_problem(self) -> str | None:
        known = (ONLINE, *self.ema.names)
        used = [
            ("sample.weights", self.sample.weights),
            *(("train.validate_with", n) for n in self.train.validate_with),
        ]
        for key, name in used:
            if name not in known:
                return f"{key}: {name} is none of {', '.join(known)}; choose one, or add its average to ema.decays"
        if len(set(self.train.validate_with)) < len(self.train.validate_with):
            return f"train.validate_with: {list(self.train.validate_with)} names weights twice; leave one out"
        return None
