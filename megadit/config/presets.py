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

# The keys that a change of preset resets. Keys that depend on the data (in_channels, input_size, num_classes,
# learn_sigma) and base hyperparameters (output_mult, role_hps, init) are not among them: a file's values of these are
# kept when the preset changes.
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
    """The names of all presets."""
    return tuple(_table())


def preset(name: str) -> ModelConfig:
    """The architecture called ``name``, e.g. ``dit-xl-2`` or ``dit-xl-2-mup``. Raises UserError for another name.

    Under μP the head dimension is fixed (64, for XL 72) and the number of heads follows from the width, so that a proxy
    is the same preset with another ``width``; under SP the number of heads is fixed.
    """
    return ModelConfig(**preset_values(name))


def preset_values(name: str) -> dict[str, Any]:
    """The keys of a ``model:`` section that the preset sets. Raises UserError for an unknown name."""
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
    """Two presets by name: ``name`` under SP with ``heads``, and ``name-mup`` with the head dimension that follows."""
    sp = {"heads": heads, "parametrization": "sp"}
    mup = {"head_dim": shape["width"] // heads, "parametrization": "mup", "base_width": base_width}
    return {name: {**shape, **sp}, f"{name}-mup": {**shape, **mup}}
