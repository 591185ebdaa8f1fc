"""``model.*``: the architecture, its parametrization and its base hyperparameters per role."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megadit.config.base import Section

Role = Literal["input", "hidden", "vector", "output", "finite"]


class RoleHP(Section):
    """Base (width-independent) hyperparameters of one role; all are factors on the table's defaults."""

    mult: float = Field(1.0, gt=0, description="forward multiplier on the layer's input (not for vectors)")
    init_std: float = Field(1.0, gt=0, description="factor on the initial standard deviation")
    lr: float = Field(1.0, gt=0, description="factor on the learning rate")


class RoleHPs(Section):
    """Base hyperparameters per role. The readout's multiplier is ``model.output_mult``."""

    input: RoleHP = RoleHP()
    hidden: RoleHP = RoleHP()
    vector: RoleHP = RoleHP()
    output: RoleHP = RoleHP()
    finite: RoleHP = RoleHP()


class ModelConfig(Section):
    """One architecture at one size. Lengths are in tokens or latent pixels; ``width`` is n of the paper."""

    family: Literal["dit"] = Field("dit", description="which architecture")
    width: int = Field(384, ge=1, description="hidden size n")
    depth: int = Field(12, ge=1, description="number of Transformer blocks")
    heads: int | None = Field(None, ge=1, description="attention heads; or give head_dim")
    head_dim: int | None = Field(None, ge=1, description="channels per head; constant in width under muP")
    patch_size: int = Field(2, ge=1, description="side of a token in (latent) pixels")
    in_channels: int = Field(4, ge=1, description="channels of the (latent) image")
    input_size: int = Field(32, ge=1, description="side of the (latent) image in pixels")
    learn_sigma: bool = Field(True, description="predict the variance too: 2C output channels")
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = Field("gelu_tanh", description="activation of the MLP")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden size of the MLP over width")
    qk_norm: Literal["none", "rms"] = Field("none", description="RMSNorm of queries and keys")
    attention_precision: Literal["auto", "fp32"] = Field(
        "auto", description="fp32: attention's scores and softmax in float32 under bf16 and fp16"
    )
    norm_precision: Literal["auto", "fp32"] = Field(
        "auto", description="fp32: norms and their modulation in float32 under bf16 and fp16, rounded once"
    )
    num_classes: int = Field(1000, ge=0, description="0: unconditional; the null label is num_classes")

    parametrization: Literal["sp", "mup"] = Field("sp", description="standard, or maximal update")
    base_width: int | None = Field(None, ge=1, description="n_base of muP; width / base_width is m")
    output_mult: float = Field(1.0, gt=0, description="readout multiplier phi_out in base units")
    init: Literal["auto", "original", "fan_in"] = Field(
        "auto", description="original: the family's own init; fan_in: sigma/sqrt(fan_in); auto: by parametrization"
    )
    adaln_init: Literal["auto", "zero", "fan_in"] = Field("auto", description="auto: zero under original init")
    role_hps: RoleHPs = RoleHPs()

    @property
    def num_heads(self) -> int:
        """Number of attention heads, from ``heads`` or ``width / head_dim``."""
        return self.heads if self.heads is not None else self.width // self._head_dim_given

    @property
    def head_channels(self) -> int:
        """Channels per head."""
        return self.width // self.num_heads

    @property
    def _head_dim_given(self) -> int:
        assert self.head_dim is not None  # held by the validator
        return self.head_dim

    @property
    def out_channels(self) -> int:
        """C, or 2C when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def init_scheme(self) -> str:
        """``original`` or ``fan_in``, with ``auto`` resolved (SP: original, muP: fan_in as the paper's code)."""
        if self.init != "auto":
            return self.init
        return "fan_in" if self.parametrization == "mup" else "original"

    @property
    def adaln_zero(self) -> bool:
        """Whether the adaLN modulation starts at zero, with ``auto`` resolved."""
        if self.adaln_init != "auto":
            return self.adaln_init == "zero"
        return self.init_scheme == "original"

    @property
    def width_mult(self) -> float:
        """m = width / base_width under muP, 1 under SP."""
        return self.width / self.base_width if self.parametrization == "mup" and self.base_width else 1.0

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.heads is None and self.head_dim is None:
            raise ValueError("heads: give the number of heads, or head_dim")
        if self.heads is not None:
            if self.width % self.heads:
                raise ValueError(
                    f"heads: {self.heads} does not divide width {self.width}; choose heads that divide the width"
                )
            if self.head_dim is not None and self.head_dim * self.heads != self.width:
                raise ValueError(
                    f"head_dim: {self.head_dim} x heads {self.heads} is not width {self.width}; give one of the two"
                )
        elif self.width % self._head_dim_given:
            raise ValueError(
                f"head_dim: {self.head_dim} does not divide width {self.width}; choose a width that is a multiple of it"
            )
        if self.width % 4:
            raise ValueError(f"width: {self.width} is not a multiple of 4, which 2-D sin-cos positions need")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size: {self.patch_size} does not divide input_size {self.input_size}; choose one that does"
            )
        if self.parametrization == "mup" and self.base_width is None:
            raise ValueError("base_width: muP needs the proxy's base width; set it, e.g. to 288 as the paper does")
        if self.role_hps.output.mult != 1.0:
            raise ValueError("role_hps.output.mult: the readout multiplier is set by output_mult; leave this at 1")
        return self
