"""MMDiT (Esser et al., arXiv 2403.03206): text to image."""

from __future__ import annotations

from megadit.config.family import FamilySpec
from megadit.models.mmdit.presets import PRESETS

FAMILY = FamilySpec(
    name="mmdit",
    model="megadit.models.mmdit.model:MMDiT",
    init={"original": "megadit.models.mmdit.init:ORIGINAL"},
    presets=PRESETS,
    conversion="megadit.models.mmdit.convert:CONVERSION",
    condition="text",
    pooled_text=True,
    text_keys="joint",
    keys=("adaln_init", "pos_embed_max_size"),
    layouts=("tensor", "sequence", "pipeline"),
)
