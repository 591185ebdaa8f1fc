"""Initial values from the specs, keyed by (seed, canonical name) and element index.

A value depends on nothing else: not on the order in which layers are built, on which rank holds it or on
the device. A shard that holds elements [start, start + count) of the flattened global parameter draws
only these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megadit import rng
from megadit.mup.spec import ParamSpec, walk_specs

_CHUNK = 1 << 20  # elements drawn at a time: bounds the generator's temporaries to some tens of megabytes


def init_values(
    spec: ParamSpec,
    name: str,
    seed: int,
    *,
    start: int = 0,
    count: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Initial values of elements [start, start + count) of parameter ``name``, flat float32 (all by default)."""
    count = spec.numel - start if count is None else count
    if spec.init_std == 0.0:
        return torch.full((count,), spec.init_value, dtype=torch.float32, device=device)
    key = rng.stream_key(seed, "init", name)
    out = torch.empty(count, dtype=torch.float32, device=device)
    for first in range(0, count, _CHUNK):
        piece = (min(_CHUNK, count - first),)
        if spec.init_dist == "uniform":
            unit = rng.uniform(key, piece, start=start + first, device=device)
            values = unit.mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0) * spec.init_std)
        else:
            values = rng.normal(key, piece, start=start + first, device=device).mul_(spec.init_std)
        out[first : first + piece[0]] = values
    return out


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Set every parameter of ``model`` in place, and its fixed tables (modules with ``reset_buffers``).

    Parameters must be whole (global shape) and on a real device; any floating dtype.
    """
    for name, param, spec in walk_specs(model):
        if spec.init_std == 0.0:
            param.fill_(spec.init_value)
        else:
            param.copy_(init_values(spec, name, seed, device=param.device).view(param.shape))
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()
