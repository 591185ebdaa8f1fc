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
from megadit.mup.spec import ParamSpec, walk_slices
from megadit.slices import ShardRegions, contiguous_spans

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
            values = _spread(rng.uniform(key, piece, start=start + first, device=device), spec)
        else:
            values = rng.normal(key, piece, start=start + first, device=device).mul_(spec.init_std)
        out[first : first + piece[0]] = values
    return out


def slice_values(
    spec: ParamSpec, name: str, seed: int, shard_regions: ShardRegions, *, device: torch.device | str | None = None
) -> Tensor:
    """Initial values of a slice of parameter ``name`` (see ``megadit.slices``), flat float32, and of nothing else.

    Equal, bit for bit, to the same elements of ``init_values``.
    """
    spans = sorted(contiguous_spans(spec.shape, shard_regions, 0, spec.numel), key=lambda span: span.offset)
    count = sum(span.length for span in spans)
    if spec.init_std == 0.0:
        return init_values(spec, name, seed, count=count, device=device)
    if any(span.length != spans[0].length for span in spans):
        return torch.cat(
            [init_values(spec, name, seed, start=span.first, count=span.length, device=device) for span in spans]
        )
    length = spans[0].length
    if length >= _CHUNK // 4:
        parts = [init_values(spec, name, seed, start=span.first, count=length, device=device) for span in spans]
        return torch.cat(parts)
    key = rng.stream_key(seed, "init", name)
    firsts = torch.tensor([span.first for span in spans], dtype=torch.int64, device=device)
    out = torch.empty(len(spans), length, dtype=torch.float32, device=device)
    rows = max(_CHUNK // length, 1)
    for low in range(0, len(spans), rows):
        starts = firsts[low : low + rows]
        if spec.init_dist == "uniform":
            out[low : low + rows] = _spread(rng.uniform_spans(key, starts, length), spec)
        else:
            out[low : low + rows] = rng.normal_spans(key, starts, length).mul_(spec.init_std)
    return out.flatten()


def _spread(unit: Tensor, spec: ParamSpec) -> Tensor:
    """Uniforms in (0, 1] -> uniforms of mean 0 and the spec's standard deviation, in place."""
    return unit.mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0) * spec.init_std)


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Set every parameter of ``model`` in place, and its fixed tables (modules with ``reset_buffers``).

    Parameters must be on a real device and of global shape, or the slice that their module declares; any floating
    dtype.
    """
    for name, param, spec, shard_regions in walk_slices(model):
        if spec.init_std == 0.0:
            param.fill_(spec.init_value)
        elif shard_regions is not None:
            param.copy_(slice_values(spec, name, seed, shard_regions, device=param.device).view(param.shape))
        else:
            param.copy_(init_values(spec, name, seed, device=param.device).view(param.shape))
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()
