"""Named architectures: the original under SP by its bare name, the paper's μP version with the suffix ``-mup``."""

from __future__ import annotations

import difflib
from typing import Any

from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError

# The keys that a preset decides. What the data decide (in_channels, input_size, num_classes, learn_sigma) and the
# base hyperparameters (output_mult, role_hps, init) are not among them: what a file says of them outlives a change of
# preset, and what a preset itself says of them goes with it.
PRESET_KEYS = (
    "family",
    "width",
    "depth",
    "heads",
    "head_dim",
    "patch_size",
    "mlp",
    "mlp_ratio",
    "qk_norm",
    "qkv_bias",
    "text",
    "conv",
    "mlp_time_embed",
    "pos_scale",
    "parametrization",
    "base_width",
)

MUP_BASE_WIDTH = 288  # the proxy of arXiv 2505.15270, section 5.1; all runs of one study share it
MMDIT_BASE_WIDTH = 1920  # of its section 5.2, between the widths of proxy and target

# Table 1 of the DiT paper (arXiv 2212.09748): width, depth, heads.
_DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_DIT_PATCHES = (2, 4, 8)
# Width, depth (without the middle block) and heads of U-ViT.
_UVIT_SIZES = {"s": (512, 12, 8), "m": (768, 16, 12), "l": (1024, 20, 16), "h": (1152, 28, 16)}


def preset_names() -> tuple[str, ...]:
    """Every name that ``preset`` knows."""
    return tuple(_table())


def preset(name: str) -> ModelConfig:
    """The architecture called ``name``, e.g. ``dit-xl-2`` or ``dit-xl-2-mup``. Raises UserError for another name.

    Under μP the head dimension is what stays fixed (64, for XL 72) and the heads follow from the width, so a
    proxy is the same preset with another ``width``; under SP the number of heads is the published one.
    """
    return ModelConfig(**preset_values(name))


def preset_values(name: str) -> dict[str, Any]:
    """What ``preset(name)`` sets, as the keys of a ``model:`` section."""
    table = _table()
    if not isinstance(name, str) or name not in table:
        near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)
        raise UserError(f"model.preset: {name!r} is not a preset; did you mean {near[0]}?")
    return dict(table[name])


def _table() -> dict[str, dict[str, Any]]:
    return _dit() | _pixart() | _uvit() | _mmdit()


def _pair(name: str, shape: dict[str, Any], heads: int, base_width: int) -> dict[str, dict[str, Any]]:
    """``name`` under SP with its published heads, and ``name-mup``, whose head dimension is what stays fixed."""
    sp = {"heads": heads, "parametrization": "sp"}
    mup = {"head_dim": shape["width"] // heads, "parametrization": "mup", "base_width": base_width}
    return {name: shape | sp, f"{name}-mup": shape | mup}


def _dit() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for size, (width, depth, heads) in _DIT_SIZES.items():
        for patch in _DIT_PATCHES:
            shape = {"family": "dit", "width": width, "depth": depth, "patch_size": patch}
            table |= _pair(f"dit-{size}-{patch}", shape, heads, MUP_BASE_WIDTH)
    return table


def _pixart() -> dict[str, dict[str, Any]]:
    """PixArt-alpha (arXiv 2310.00426) and its proxy of width 288; T5 captions of 120 tokens."""
    shape = {"family": "pixart", "depth": 28, "patch_size": 2, "num_classes": 0, "text": {"dim": 4096}}
    table = _pair("pixart-xl-2", shape | {"width": 1152}, 16, MUP_BASE_WIDTH)
    table |= _pair("pixart-proxy", shape | {"width": 288}, 4, MUP_BASE_WIDTH)
    return {name: keys | ({"init": "authors"} if name.endswith("-mup") else {}) for name, keys in table.items()}


def _uvit() -> dict[str, dict[str, Any]]:
    """U-ViT (arXiv 2209.12152), table 1; its H/2 alone has no convolution at the end."""
    table: dict[str, dict[str, Any]] = {}
    shape = {"family": "uvit", "patch_size": 2, "mlp": "gelu", "qkv_bias": False, "learn_sigma": False}
    for size, (width, depth, heads) in _UVIT_SIZES.items():
        sized = shape | {"width": width, "depth": depth, "conv": size != "h"}
        table |= _pair(f"uvit-{size}", sized, heads, MUP_BASE_WIDTH)
    return table


def _mmdit() -> dict[str, dict[str, Any]]:
    """MMDiT (arXiv 2403.03206) at the two sizes of arXiv 2505.15270, section 5.2: 0.18B and 18B parameters."""
    shape = {"family": "mmdit", "depth": 16, "patch_size": 2, "mlp": "swiglu", "num_classes": 0, "learn_sigma": False}
    shape |= {"text": {"dim": 4096}, "qk_norm": "rms"}  # QK norm: its appendix C.4
    table = _pair("mmdit-proxy", shape | {"width": 512}, 8, MMDIT_BASE_WIDTH)
    return table | _pair("mmdit-18b", shape | {"width": 5120}, 80, MMDIT_BASE_WIDTH)
