"""To and from the ``mup`` package (Microsoft, 1.0.0): infshape attributes and base-shape files.

The package is imported only on demand: it draws in pandas and matplotlib.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from torch import nn

from megadit.files.paths import atomic_write, begins_with
from megadit.mup.spec import param_specs, walk_specs

_HEADER = "# Base shapes for the mup package: null marks a finite dimension, a number the size in the base model.\n"


def attach_infshapes(model: nn.Module) -> None:
    """Set ``infshape`` on every parameter, in global dims, so that mup.MuAdamW and mup's coord check run on it."""
    from mup.infshape import InfDim, InfShape

    for _, param, spec in walk_specs(model):
        dims = [InfDim(base, size) for base, size in zip(spec.base_shape, spec.shape, strict=True)]
        param.infshape = InfShape(dims)  # type: ignore[attr-defined]


def is_base_shapes(path: Path) -> bool:
    """Whether ``path`` is a file that ``save_base_shapes`` wrote."""
    return begins_with(path, (_HEADER.encode(),))


def save_base_shapes(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the base shapes of ``model`` as a ``.bsh`` file that mup.set_base_shapes(model, path) accepts."""
    shapes = {name: list(spec.base_shape) for name, spec in param_specs(model).items()}
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(
            _HEADER + yaml.safe_dump(shapes, sort_keys=False, default_flow_style=None), encoding="utf-8"
        )
