"""U-ViT's published sizes: table 1 of arXiv 2209.12152; its H/2 alone has no convolution at the end."""

from __future__ import annotations

from megadit.config.presets import sp_and_mup

# Width, depth (without the middle block) and heads.
_SIZES = {"s": (512, 12, 8), "m": (768, 16, 12), "l": (1024, 20, 16), "h": (1152, 28, 16)}
_SHAPE = {"patch_size": 2, "mlp": "gelu", "qkv_bias": False, "learn_sigma": False}

PRESETS = {
    name: keys
    for size, (width, depth, heads) in _SIZES.items()
    for name, keys in sp_and_mup(
        f"uvit-{size}", {**_SHAPE, "width": width, "depth": depth, "conv": size != "h"}, heads
    ).items()
}
