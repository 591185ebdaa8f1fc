"""``model.*``: the architecture, its parametrization and its base hyperparameters per role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megadit.config.family import FamilySpec, families, family_spec
from megadit.config.options import Scalar, with_defaults
from megadit.config.schema.registered import Registered
from megadit.config.schema.section import Section
from megadit.extensions import FAMILIES

LARGEST = 2**20  # above any model; the bytes of such sizes still fit into 64 bits

# Keys of ModelConfig that only families whose spec lists them have; refused elsewhere.
OF_SOME_FAMILIES = ("adaln_init", "pos_scale", "pos_embed_max_size", "conv", "mlp_time_embed")

Role = Literal["input", "hidden", "vector", "output", "finite"]


class RoleHP(Section):
    """Base (width-independent) hyperparameters of one role, as factors on the parametrization's values."""

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


class TextInput(Section):
    """Shape of the text features of a text-conditional model; ``data.text`` is their encoder."""

    dim: int = Field(4096, ge=1, le=LARGEST, description="channels per token")
    max_length: int = Field(
        120, ge=1, le=LARGEST, description="tokens; longer texts are truncated, shorter ones padded and masked"
    )
    pooled_dim: int = Field(0, ge=0, le=LARGEST, description="mmdit: channels of the pooled feature; 0: none")
    mask: bool = Field(
        True,
        description="false: no attention mask, so that padding is attended to, as in Stable Diffusion 3 and U-ViT",
    )


class RepaConfig(Section):
    """REPA's projector (arXiv 2410.06940): from a block's image tokens to the features of a pretrained encoder."""

    block: int = Field(8, ge=1, le=LARGEST, description="the block whose tokens are projected, counted from 1")
    feature_dim: int = Field(768, ge=1, le=LARGEST, description="channels of the target features")
    hidden: int = Field(2048, ge=1, le=LARGEST, description="width of the projector, independent of the model's")
    norm: Literal["none", "rms"] = Field("none", description="RMSNorm after the first linear")


class ModelConfig(Section):
    """One architecture at one size. Lengths are in tokens or latent pixels; ``width`` is n of the muP paper."""

    family: Annotated[str, Registered(FAMILIES)] = Field(FAMILIES.names()[0], description="architecture")
    width: int = Field(384, ge=1, le=LARGEST, description="hidden size n")
    depth: int = Field(12, ge=1, le=LARGEST, description="number of Transformer blocks")
    heads: int | None = Field(None, ge=1, le=LARGEST, description="attention heads; or give head_dim")
    head_dim: int | None = Field(None, ge=1, le=LARGEST, description="channels per head; constant in width under muP")
    patch_size: int = Field(2, ge=1, le=LARGEST, description="side of a token in (latent) pixels")
    in_channels: int = Field(4, ge=1, le=LARGEST, description="channels of the (latent) image")
    input_size: int = Field(32, ge=1, le=2**16, description="side of the (latent) image in pixels")
    learn_sigma: bool = Field(True, description="predict the variance, too: 2C output channels")
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = Field("gelu_tanh", description="activation of the MLP")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="hidden size of the MLP over width")
    qk_norm: Literal["none", "rms"] = Field("none", description="RMSNorm of queries and keys")
    attention_precision: Literal["auto", "fp32"] = Field(
        "auto",
        description="fp32: attention scores and softmax in float32 under bf16 and fp16 (pixart: of self-attention)",
    )
    norm_precision: Literal["auto", "fp32"] = Field(
        "auto", description="fp32: norms and their modulation in float32 under bf16 and fp16"
    )
    qkv_bias: bool = Field(True, description="bias of the queries, keys and values (false in the original U-ViT)")
    num_classes: int = Field(1000, ge=0, le=2**31, description="0: no classes; the null label is num_classes")
    text: TextInput | None = Field(None, description="pixart, uvit, mmdit: text conditioning; null: none")
    repa: RepaConfig | None = Field(None, description="projector of the REPA loss; null: none")
    pos_scale: float = Field(1.0, gt=0, description="pixart: divisor of position coordinates")
    pos_embed_max_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST,
        description="mmdit: side, in tokens, of the position table whose centre is cropped; null: the input's",
    )
    conv: bool = Field(True, description="uvit: a 3x3 convolution at the end")
    mlp_time_embed: bool = Field(False, description="uvit: an MLP on the timestep features")
    options: dict[str, Scalar] = Field({}, description="options of a plugin's family, as name: value")

    parametrization: Literal["sp", "mup"] = Field("sp", description="standard or maximal update parametrization")
    base_width: int | None = Field(None, ge=1, le=LARGEST, description="n_base of muP; width / base_width is m")
    output_mult: float = Field(1.0, gt=0, description="readout multiplier phi_out in base units")
    init: Literal["auto", "original", "fan_in", "authors"] = Field(
        "auto",
        description="original: the family's own init; fan_in: std 1/sqrt(fan_in); authors (pixart): that of the "
        "paper's PixArt-muP; auto: original under sp, fan_in under mup",
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
    def blocks(self) -> int:
        """Number of Transformer blocks: the depth, U-ViT's plus one."""
        return family_spec(self.family).blocks(self)

    @property
    def init_scheme(self) -> str:
        """``init`` with ``auto`` resolved: original under SP, fan_in under muP, as in the paper's DiT-muP."""
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

    @field_validator("options")
    @classmethod
    def _declared(cls, given: dict[str, Scalar], info: ValidationInfo) -> dict[str, Scalar]:
        """Options with the family's defaults. Raises ValueError for an undeclared one, or one of another type."""
        if "family" not in info.data:  # an error by itself
            return given
        return with_defaults(given, family_spec(info.data["family"]).options, f"family {info.data['family']}")

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
        spec = family_spec(self.family)
        self._check_family(spec)
        if self.parametrization == "mup" and self.base_width is None:
            raise ValueError("base_width: muP needs the proxy's base width; set it, e.g. to 288 as the paper does")
        if self.role_hps.output.mult != 1.0:
            raise ValueError("role_hps.output.mult: the readout multiplier is set by output_mult; leave this at 1")
        self._check_roles(spec)
        return self

    def _check_family(self, spec: FamilySpec) -> None:
        """Raise ValueError for a condition, init or key that the family does not have."""
        if spec.condition == "classes" and self.text is not None:
            takers = _named(other for other in families() if other.condition != "classes")
            raise ValueError(f"text: belongs to {takers}; set text to null, or another family")
        if spec.condition == "text" and self.text is None:
            raise ValueError(f"text: is missing, and {self.family} is conditioned on text; give text.dim")
        if spec.condition == "text" and self.num_classes:
            raise ValueError(
                f"num_classes: {self.num_classes}, but {self.family} is conditioned on text; set num_classes to 0"
            )
        if self.text is not None and self.text.pooled_dim and not spec.pooled_text:
            takers = _named(other for other in families() if other.pooled_text)
            raise ValueError(f"text.pooled_dim: {self.text.pooled_dim} belongs to {takers}; set it to 0")
        if self.text is not None and self.num_classes:
            raise ValueError(
                f"num_classes: {self.num_classes} beside text; {self.family} takes one of the two: set num_classes to "
                "0, or text to null"
            )
        spec.check(self)
        if self.repa is not None and self.repa.block > self.blocks:
            raise ValueError(f"repa.block: {self.repa.block} is not one of the model's {self.blocks} blocks; lower it")
        if self.init not in ("auto", "fan_in", *spec.init):
            raise ValueError(
                f"init: authors is the start of the paper's PixArt-muP, not of {self.family}; choose another, such "
                "as fan_in, which is what the paper's DiT-muP starts with"
            )
        for key in OF_SOME_FAMILIES:
            value = getattr(self, key)
            if key in spec.keys or value == type(self).model_fields[key].default:
                continue
            if key == "adaln_init":
                raise ValueError(f"adaln_init: {value}, but {self.family} has no adaLN; leave it out")
            owners = _named(other for other in families() if key in other.keys)
            raise ValueError(f"{key}: {value} belongs to {owners}; leave it out")

    def _check_roles(self, spec: FamilySpec) -> None:
        """Raise ValueError for a factor of ``role_hps`` without effect in this model."""
        drawn = {*spec.drawn_roles(self), *(("output", "finite") if self.repa is not None else ())}
        read = {
            ("vector", "mult"): False,
            ("vector", "init_std"): "vector" in drawn,
            ("finite", "mult"): "finite" in drawn,
            ("finite", "init_std"): "finite" in drawn,
            ("output", "init_std"): "output" in drawn,
        }
        for (role, factor), has_effect in read.items():
            value = getattr(getattr(self.role_hps, role), factor)
            if value != 1.0 and not has_effect:
                reason = "biases and gains multiply no input" if factor == "mult" else "all of it starts constant"
                raise ValueError(f"role_hps.{role}.{factor}: {value:g} has no effect here, {reason}; leave it at 1")


def _named(specs: Iterable[FamilySpec]) -> str:
    """``family a`` or ``families a, b and c``."""
    *first, last = [spec.name for spec in specs]
    return f"families {', '.join(first)} and {last}" if first else f"family {last}"
