"""``optim.*``: AdamW, its schedule and gradient clipping, in base (width-independent) units."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megadit.config.schema.lengths import Length, check_length, length_schema
from megadit.config.schema.registered import Registered
from megadit.config.schema.section import Section
from megadit.extensions import SCHEDULES


class ClipGroups(Section):
    """Base thresholds by role for ``optim.clip.mode: per_group``; null: ``optim.clip.value``."""

    input: float | None = Field(None, gt=0, description="input weights and tables")
    hidden: float | None = Field(None, gt=0, description="weights from width to width")
    vector: float | None = Field(None, gt=0, description="biases and gains")
    output: float | None = Field(None, gt=0, description="the readout")
    finite: float | None = Field(None, gt=0, description="parameters without a dimension that grows with width")


class ClipConfig(Section):
    """Gradient clipping by norms before the update; ``value: null`` turns it off."""

    mode: Literal["global", "per_group"] = Field(
        "global",
        description="global: the norm over all parameters; per_group: the norm of each role, its base threshold times "
        "1/sqrt(m) for input, vector and output",
    )
    value: float | None = Field(None, gt=0, description="the (base) threshold; null: no clipping")
    groups: ClipGroups = ClipGroups()

    @model_validator(mode="after")
    def _consistent(self) -> ClipConfig:
        thresholds = {role: value for role, value in self.groups if value is not None}
        if thresholds and self.mode == "global":
            role, value = next(iter(thresholds.items()))
            raise ValueError(
                f"groups.{role}: {value} belongs to mode per_group; set mode to per_group, or leave it out"
            )
        if self.mode == "per_group" and self.value is None and not thresholds:
            raise ValueError(
                "mode: per_group has no threshold and would clip nothing; set value, or groups of single roles"
            )
        return self


OptimizerImplementation = Literal[
    "auto", "fused", "torch-fused", "torch-foreach", "deepspeed-fused", "deepspeed-cpu", "apex"
]


class OptimConfig(Section):
    """AdamW in base units: the learning rate of a parameter group is schedule(step) x lr x lr_mult."""

    lr: float = Field(1e-4, gt=0, description="base learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of Adam's two moments")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    eps_mode: Literal["constant", "scaled"] = Field(
        "constant", description="scaled: eps / m except for finite parameters"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay at the base width")
    wd_mode: Literal["independent", "constant", "sqrt"] = Field(
        "independent", description="hidden decay over width: x m (lr x decay constant), x 1, x sqrt(m)"
    )
    wd_vectors: bool = Field(False, description="decay biases, gains and tables too, as mup.MuAdamW does")
    implementation: OptimizerImplementation = Field(
        "auto",
        description="auto: torch-fused; fused: one pass that unscales, clips, updates and writes the weights (Triton); "
        "apex: NVIDIA's, where installed; deepspeed-* compile their kernel at the first use",
    )
    schedule: Annotated[str, Registered(SCHEDULES)] = Field(
        "constant", description="after the warm-up; wsd: constant, then a linear decay at the end"
    )
    warmup_steps: Length = Field(
        0,
        description="optimizer steps of linear warm-up, or a share of the run such as 5%",
        json_schema_extra=length_schema(0),
    )
    decay_steps: Length | None = Field(
        None,
        description="wsd: length of the final linear decay, in steps or as a share such as 20%; default a tenth",
        json_schema_extra=length_schema(1, null=True),
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="floor of cosine and wsd as a share of the peak")
    clip: ClipConfig = ClipConfig()

    @field_validator("warmup_steps", "decay_steps", mode="before")
    @classmethod
    def _length(cls, value: Any, info: ValidationInfo) -> Any:
        is_decay = info.field_name == "decay_steps"
        if value is not None or not is_decay:
            check_length(str(info.field_name), value, least=int(is_decay))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must both lie in [0, 1); the usual are [0.9, 0.999]")
        if self.decay_steps is not None and self.schedule in ("constant", "cosine"):
            raise ValueError(
                f"decay_steps: {self.decay_steps} belongs to schedule wsd, not {self.schedule}; set it to null"
            )
        return self
