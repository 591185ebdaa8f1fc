"""DiT's published sizes: Table 1 of arXiv 2212.09748."""

from __future__ import annotations

from megadit.config.presets import sp_and_mup

_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads

PRESETS = {
    name: keys
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
    for name, keys in sp_and_mup(
        f"dit-{size}-{patch}", {"width": width, "depth": depth, "patch_size": patch}, heads
    ).items()
}
