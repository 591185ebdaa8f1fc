"""The Triton implementation of AdamW: tables of segments, and launches.

Importing this module needs Triton.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from megadit_kernels.adamw import triton_kernels
from megadit_kernels.adamw.reference import Shard
from megadit_kernels.operators import launches

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ADDRESSES = ("master", "exp_avg", "exp_avg_sq", "gradient", "copy")


class Updater:
    """Updates shards as ``reference.update`` does: one launch for all that have the same types of operands.

    It keeps on the device which program belongs to which segment, a map for each launch of a step, until sizes change.
    """

    def __init__(self) -> None:
        # By the first master of a launch: the sizes of its segments, and the map made for them.
        self._maps: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, shards: Sequence[Shard], betas: tuple[float, float], gate: Tensor | None = None) -> list[Tensor]:
        """The shards are on one device. Returns the step counters after the update, each () float32, new tensors."""
        if not shards:
            return []
        steps = list(shards[0].step.new_empty(len(shards)).unbind())
        if not launches(shards[0].master):
            return steps
        rows: dict[tuple[torch.dtype, torch.dtype | None], list[dict[str, int]]] = defaultdict(list)
        for shard, step in zip(shards, steps, strict=True):
            for dtype, row in _segments(shard, step):
                rows[dtype, None if shard.copy is None else shard.copy.dtype].append(row)
        for (gradient, copy), segments in rows.items():
            self._launch(segments, gradient, copy, betas, gate, shards[0].master.device)
        return steps

    def _launch(
        self,
        segments: list[dict[str, int]],
        gradient: torch.dtype,
        copy: torch.dtype | None,
        betas: tuple[float, float],
        gate: Tensor | None,
        device: torch.device,
    ) -> None:
        owners = self._segment_of_program(segments, device)
        first = 0
        for row in segments:
            row["first_program"] = first
            first += _programs(row["size"])
        table = np.array([[row[field] for field in triton_kernels.FIELDS] for row in segments], dtype=np.int64)
        scalars = [value for beta in betas for value in (beta, 1 - beta, math.log(beta) if beta else -math.inf)]
        triton_kernels.update[(first,)](
            _to_device(table, device),
            owners,
            gate,
            *scalars,
            GRADIENT=_TYPES[gradient],
            COPY=None if copy is None else _TYPES[copy],
            BLOCK=triton_kernels.BLOCK,
        )

    def _segment_of_program(self, segments: list[dict[str, int]], device: torch.device) -> Tensor:
        launch, sizes = segments[0]["master"], tuple(row["size"] for row in segments)
        known, owners = self._maps.get(launch, ((), None))
        if owners is None or known != sizes:
            programs = [_programs(size) for size in sizes]
            owners = _to_device(np.repeat(np.arange(len(sizes), dtype=np.int32), programs), device)
            self._maps[launch] = sizes, owners
        return owners


def _segments(shard: Shard, new_step: Tensor) -> Iterator[tuple[torch.dtype, dict[str, int]]]:
    """Rows of the table, each with the type of its gradient; gradients that lie side by side make one segment."""
    buffers = {name: getattr(shard, name) for name in ("master", "exp_avg", "exp_avg_sq", "copy")}
    shared = {
        "step": shard.step.data_ptr(),
        "scale": 0 if shard.scale is None else shard.scale.data_ptr(),
        "lr": _bits(shard.lr),
        "decay": _bits(shard.lr * shard.weight_decay),
        "eps": _bits(shard.eps),
    }
    offset = 0
    for dtype, address, size in _runs(shard.gradients):
        row = {
            name: 0 if buffer is None else buffer.data_ptr() + offset * buffer.element_size()
            for name, buffer in buffers.items()
        }
        row["gradient"] = address
        row["size"] = size
        row["aligned"] = int(all(row[name] % 16 == 0 for name in _ADDRESSES))
        row["new_step"] = new_step.data_ptr() if offset == 0 else 0
        yield dtype, row | shared
        offset += size
    if offset > shard.master.numel():
        raise ValueError(f"{offset:,} elements of gradients for {shard.master.numel():,} of masters")


def _runs(gradients: Sequence[Tensor]) -> Iterator[tuple[torch.dtype, int, int]]:
    """Type, address and number of elements of each run of memory that the gradients fill, at least one run."""
    dtype, address, size, end = gradients[0].dtype, gradients[0].data_ptr(), 0, gradients[0].data_ptr()
    for part in gradients:
        begin, count = part.data_ptr(), part.numel()
        if count and not (part.dtype == dtype and begin == end):
            if size:
                yield dtype, address, size
            dtype, address, size = part.dtype, begin, 0
        if count:
            size, end = size + count, begin + count * part.element_size()
    yield dtype, address, size


def _programs(size: int) -> int:
    """How many programs update a segment: one counts the updates even of none."""
    return max(-(-size // triton_kernels.BLOCK), 1)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _to_device(values: Any, device: torch.device) -> Tensor:
    """Without making the host wait: the memory that is copied from is pinned until it has been read."""
    host = torch.from_numpy(values)
    return host if device.type != "cuda" else host.pin_memory().to(device, non_blocking=True)
