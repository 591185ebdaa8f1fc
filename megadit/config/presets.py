"""Named architectures: the original under SP by its bare name, the paper's μP version with the suffix ``-mup``.

Each family has a table of its own, ``presets`` of its ``FamilySpec``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megadit.config.family import families
from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError

# The keys that a preset decides. What the data decide (in_channels, input_size, num_classes, learn_sigma) and the
# base hyperparameters (output_mult, role_hps, init) are not among them: what a file says of them outlives a change of
# preset, and what a preset itself says of them goes with it.
PRESET_KEYS = (
    "family",
    "options",
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
    return table[name]


def _table() -> dict[str, dict[str, Any]]:
    return {name: {"family": spec.name, **keys} for spec in families() for name, keys in spec.presets.items()}


def sp_and_mup(
    name: str, shape: Mapping[str, Any], heads: int, base_width: int = MUP_BASE_WIDTH
) -> dict[str, dict[str, Any]]:
    """``name`` under SP with its published heads, and ``name-mup``, whose head dimension is what stays fixed."""
    sp = {"heads": heads, "parametrization": "sp"}
    mup = {"head_dim": shape["width"] // heads, "parametrization": "mup", "base_width": base_width}
    return {name: {**shape, **sp}, f"{name}-mup": {**shape, **mup}}
