"""DiT (Peebles and Xie, arXiv 2212.09748): class-conditional or unconditional."""

from __future__ import annotations

from megadit.config.family import FamilySpec
from megadit.models.dit.presets import PRESETS

FAMILY = FamilySpec(
    name="dit",
    model="megadit.models.dit.model:DiT",
    init={"original": "megadit.models.dit.init:ORIGINAL"},
    presets=PRESETS,
    conversion="megadit.models.dit.convert:CONVERSION",
    keys=("adaln_init",),
    layouts=("tensor", "sequence", "pipeline"),
)
