"""Keyed, counter-based randomness: the same numbers whatever the layout.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in plain torch integer
arithmetic or in a kernel of its own (``megadit_kernels.noise``). A stream is named by a 64-bit key, a hash of (seed,
stream name, parameter name or global sample number); its counter is the global element index. A rank therefore draws
only the elements that it owns, no full tensor is ever made, and a value does not depend on how many ranks there are, on
the micro batch or on the device (CPU and CUDA agree to rounding of log and cos).

torch's own generators do not give this: a CPU generator keeps only the low 32 bits of its seed, and
``randn(20)[:8]`` differs from ``randn(8)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megadit.keys import stream_key
from megadit_kernels import keyed_normal
from megadit_kernels.noise import reference
from megadit_kernels.noise.reference import draw, gauss, philox, unit


def sample_keys(seed: int, stream: str, numbers: Iterable[int] | Tensor) -> Tensor:
    """One key per global sample number: int64 of shape (B,), on the CPU."""
    values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    return torch.tensor([stream_key(seed, stream, int(n)) for n in values], dtype=torch.int64)


def _draw_spans(key: int, firsts: Tensor, length: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements [first, first + length) of a stream for every first: (R,) int64 -> (R, length) float32."""
    blocks = firsts[:, None] // 4 + torch.arange(length // 4 + 2, dtype=torch.int64, device=firsts.device)
    words = philox(_single(key, firsts.device)[:, None], blocks.flatten())[0]
    values = transform(words).view(firsts.shape[0], -1)
    return values.gather(1, firsts[:, None] % 4 + torch.arange(length, device=firsts.device))


def _single(key: int, device: torch.device | str | None) -> Tensor:
    return torch.tensor([key], dtype=torch.int64, device=device)


def normal(key: int, shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Standard normals, float32 of ``shape``: elements ``start`` onward of the stream, in row-major order."""
    return draw(_single(key, device), start, math.prod(shape), gauss)[0].reshape(tuple(shape))


def uniform(key: int, shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Uniforms in (0, 1], float32 of ``shape``: elements ``start`` onward of the stream, in row-major order."""
    return draw(_single(key, device), start, math.prod(shape), unit)[0].reshape(tuple(shape))


def normal_spans(key: int, firsts: Tensor, length: int) -> Tensor:
    """Standard normals, float32 (R, length): of each run the stream's elements from ``firsts``, int64 (R,), onward."""
    return _draw_spans(key, firsts, length, gauss)


def uniform_spans(key: int, firsts: Tensor, length: int) -> Tensor:
    """Uniforms in (0, 1], float32 (R, length): of each run the stream's elements from ``firsts`` onward."""
    return _draw_spans(key, firsts, length, unit)


def batch_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals per sample: keys (B,) -> float32 (B, *shape), on the device of ``keys``."""
    if keys.is_cpu:  # where kernels.noise is fused too: what a GPU trains on is drawn on it, sample times are not
        return reference.keyed_normal(keys, shape)
    return keyed_normal(keys, shape)


def batch_uniform(keys: Tensor) -> Tensor:
    """A uniform in (0, 1] per sample: keys (B,) -> float32 (B,), on the device of ``keys``."""
    return draw(keys, 0, 1, unit).reshape(keys.shape[0])


def permutation(key: int, size: int) -> Tensor:
    """A permutation of ``range(size)``: int64 (size,), the stable order of one keyed 64-bit word per element."""
    words = philox(_single(key, None)[:, None], torch.arange(size, dtype=torch.int64))[0]
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)
