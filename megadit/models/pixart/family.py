"""PixArt-alpha (Chen et al., arXiv 2310.00426): text to image."""

from __future__ import annotations

from megadit.config.family import FamilySpec
from megadit.models.pixart.presets import PRESETS

FAMILY = FamilySpec(
    name="pixart",
    model="megadit.models.pixart.model:PixArt",
    init={"original": "megadit.models.pixart.init:ORIGINAL", "authors": "megadit.models.pixart.init:AUTHORS"},
    presets=PRESETS,
    conversion="megadit.models.pixart.convert:CONVERSION",
    condition="text",
    text_keys="cross",
    null_caption="y_embedder.y_embedding",
    keys=("adaln_init", "pos_scale"),
    layouts=("tensor", "sequence", "pipeline"),
    drawn_roles=lambda config: ("vector",),  # the scale-shift tables
)
