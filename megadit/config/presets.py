"""Named architectures: the original under SP by its bare name, the paper's μP version with the suffix ``-mup``."""

from __future__ import annotations

import difflib
from typing import Any

from megadit.config.model import ModelConfig
from megadit.errors import UserError

# The keys that a preset decides. What the data decide (in_channels, input_size, num_classes, learn_sigma) and the
# base hyperparameters (output_mult, role_hps, init) are not among them, so they outlive a change of preset.
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
    "parametrization",
    "base_width",
)

MUP_BASE_WIDTH = 288  # the proxy of arXiv 2505.15270, section 5.1; all runs of one study share it

# Table 1 of the DiT paper (arXiv 2212.09748): width, depth, heads.
_DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_DIT_PATCHES = (2, 4, 8)


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
    return _dit()


def _dit() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for size, (width, depth, heads) in _DIT_SIZES.items():
        for patch in _DIT_PATCHES:
            shape: dict[str, Any] = {"family": "dit", "width": width, "depth": depth, "patch_size": patch}
            sp = {"heads": heads, "parametrization": "sp"}
            mup = {"head_dim": width // heads, "parametrization": "mup", "base_width": MUP_BASE_WIDTH}
            table[f"dit-{size}-{patch}"] = shape | sp
            table[f"dit-{size}-{patch}-mup"] = shape | mup
    return table
