"""U-ViT (Bao et al., arXiv 2209.12152): class-conditional, text-conditional or unconditional."""

from __future__ import annotations

from megadit.config.family import FamilySpec
from megadit.config.schema.model import ModelConfig
from megadit.models.uvit.presets import PRESETS


def _check(config: ModelConfig) -> None:
    if config.depth % 2:
        raise ValueError(
            f"depth: {config.depth} is odd; {config.family} has half of its blocks on each side of the middle one"
        )


def _drawn_roles(config: ModelConfig) -> tuple[str, ...]:
    original = ("vector", "output") if config.init_scheme == "original" else ()  # the patches' bias, and the readout
    return (*original, "finite") if config.conv else original


FAMILY = FamilySpec(
    name="uvit",
    model="megadit.models.uvit.model:UViT",
    init={"original": "megadit.models.uvit.init:ORIGINAL"},
    presets=PRESETS,
    conversion="megadit.models.uvit.convert:CONVERSION",
    condition="either",
    keys=("conv", "mlp_time_embed"),
    layouts=("tensor", "sequence", "pipeline"),
    blocks=lambda config: config.depth + 1,  # with the one in the middle
    check=_check,
    drawn_roles=_drawn_roles,
)
