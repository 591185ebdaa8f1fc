"""The two published starts: of official PixArt.py, and of the paper's PixArt-muP (arXiv 2505.15270)."""

from __future__ import annotations

from collections.abc import Mapping

from megadit.mup.rules import SMALL, XAVIER, InitRule

# As DiT; N(0, .02) on t_block and the caption MLP too, tables N(0, 1/n). The patch embedding's bias, which it leaves to
# torch, is zero as in DiT and in arXiv 2505.15270's baseline.
ORIGINAL: Mapping[str, InitRule] = {
    "linear": XAVIER,
    "patch": XAVIER,
    "timestep": SMALL,
    "text": SMALL,
    "table": SMALL,
    "adaln": SMALL,
    "modulation_table": InitRule("inverse_sqrt_fan_out"),
}
# mup.init's xavier_uniform_ and normal_(std=.02), anchored at the base width. Its xavier_uniform_ takes the patch
# embedding as it is, 4-D, not flattened; the scale-shift tables are .02 too.
AUTHORS: Mapping[str, InitRule] = {
    "linear": XAVIER,
    "patch": InitRule("xavier_uniform", per_tap=True),
    "timestep": SMALL,
    "text": SMALL,
    "adaln": SMALL,
}
