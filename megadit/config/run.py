"""``RunConfig``: every section of a training run. Hyperparameters are in base (width-independent) units."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megadit.config.base import Section
from megadit.config.model import ModelConfig


class ObjectiveConfig(Section):
    """What is predicted and how timesteps are drawn and weighted."""

    kind: Literal["ddpm", "flow"] = "ddpm"
    prediction: Literal["eps", "v"] = Field("eps", description="ddpm only; flow predicts noise - x0")
    diffusion_steps: int = Field(1000, ge=2, description="ddpm only: length of the linear schedule")
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="flow: resolution shift t' = s t / (1 + (s - 1) t)")
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of samples trained unconditionally")

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.kind == "flow" and self.prediction != "eps":
            raise ValueError("prediction: v belongs to kind ddpm; flow matching always predicts noise - x0")
        if self.kind == "flow" and self.weighting != "none":
            raise ValueError("weighting: min_snr belongs to kind ddpm; set weighting to none for flow")
        if self.kind == "ddpm" and (self.time_sampling != "uniform" or self.shift != 1.0):
            raise ValueError("time_sampling: ddpm draws timesteps uniformly without shift; use kind flow for these")
        return self


class VaeConfig(Section):
    """A diffusers AutoencoderKL folder that turns images into latents as they are read."""

    path: str
    scale: float = Field(0.18215, gt=0, description="latents are multiplied by this")
    shift: float = Field(0.0, description="subtracted from latents before scaling")


class DataConfig(Section):
    """Where images come from and what conditions them."""

    name: Literal["emoji", "digits", "fashion-mnist", "image-folder"] = "emoji"
    path: str | None = Field(None, description="folder of fashion-mnist or image-folder data")
    image_size: int | None = Field(None, ge=1, description="side in pixels; default: the data set's own size")
    condition: Literal["class", "none"] = "class"
    flip: bool = Field(False, description="mirror half of the images")
    val_fraction: float = Field(0.05, ge=0, lt=1, description="share held out, split by base name")
    skin_tones: bool = Field(False, description="emoji: keep the skin-tone variants")
    workers: int = Field(0, ge=0, description="decoding processes per rank")
    vae: VaeConfig | None = None


class ClipConfig(Section):
    """Gradient clipping by the global norm over all parameters; ``value: null`` turns it off."""

    mode: Literal["global"] = "global"
    value: float | None = Field(None, gt=0)


class OptimConfig(Section):
    """AdamW in base units: what a group really gets is schedule(step) x lr x its lr_mult."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    eps_mode: Literal["constant", "scaled"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    wd_mode: Literal["independent", "constant", "sqrt"] = "independent"
    wd_vectors: bool = Field(False, description="decay biases, gains and tables too, as mup.MuAdamW does")
    implementation: Literal["auto", "torch-fused", "torch-foreach", "deepspeed-fused", "deepspeed-cpu"] = "auto"
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    decay_steps: int | None = Field(None, ge=1, description="wsd: length of the final linear decay; default a tenth")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="floor of cosine and wsd as a share of the peak")
    clip: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must both lie in [0, 1)")
        return self


class ParallelConfig(Section):
    """How the run is spread over processes."""

    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="ZeRO stage; default 0 for one fp32 process, else 1"
    )


class TrainConfig(Section):
    """Length, batch, precision and what is written when (all in optimizer steps)."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training set, instead of steps")
    global_batch: int = Field(256, ge=1, description="images per optimizer step over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="images per forward pass and rank")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int | None = Field(None, ge=1, description="default: at the end only")
    keep_last: int = Field(2, ge=1, description="checkpoints kept")
    sample_every: int | None = Field(None, ge=1, description="default: at the end only")
    validate_every: int | None = Field(None, ge=1, description="default: at the end only")
    validation_images: int = Field(256, ge=0, description="0: no validation loss")
    tensorboard: bool = True
    wandb: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: give either steps or epochs, not both and not neither")
        return self


class SampleConfig(Section):
    """How pictures are drawn from the model, during training and by launch/sample.py."""

    scheduler: Literal["auto", "ddpm", "ddim", "dpm", "euler"] = Field(
        "auto", description="auto: dpm for ddpm-trained models, euler for flow"
    )
    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance scale; 1 is off")
    guidance_channels: int | None = Field(None, ge=1, description="guide only the first k channels (DiT: 3)")
    count: int = Field(64, ge=1, description="pictures in a grid")
    seed: int = Field(0, ge=0)


class RunConfig(Section):
    """Everything a run needs; saved, resolved, as ``config.yaml`` in its run directory."""

    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()
