"""Keyed, counter-based randomness: the same numbers whatever the layout.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain torch
integer arithmetic. A stream is named by a 64-bit key, a hash of (seed, stream name, parameter name or
global sample number); its counter is the global element index. A rank therefore draws only the elements
that it owns, no full tensor is ever made, and a value does not depend on how many ranks there are, on
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

_MASK = 0xFFFFFFFF
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57  # Philox round multipliers
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_ROUNDS = 10
_TO_UNIT = 2.0**-32


def sample_keys(seed: int, stream: str, numbers: Iterable[int] | Tensor) -> Tensor:
    """One key per global sample number: int64 of shape (B,), on the CPU."""
    values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    return torch.tensor([stream_key(seed, stream, int(n)) for n in values], dtype=torch.int64)


def _philox(keys: Tensor, blocks: Tensor) -> Tensor:
    """Ten Philox rounds: keys (K, 1) int64, counters (N,) int64 -> (K, N, 4) uint32 values held in int64."""
    k0, k1 = keys & _MASK, (keys >> 32) & _MASK
    shape = (keys.shape[0], blocks.shape[0])  # torch.broadcast_shapes would import sympy: two seconds of CPU
    c0, c1 = (blocks & _MASK).expand(shape), ((blocks >> 32) & _MASK).expand(shape)
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=blocks.device).expand(shape)
    for _ in range(_ROUNDS):
        # int64 products wrap, which keeps all 64 bits: the shift is masked because it is arithmetic.
        p0, p1 = c0 * _MUL_0, c2 * _MUL_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _unit(words: Tensor) -> Tensor:
    """uint32 words -> float32 in the open interval (0, 1]: never 0, so that log is finite."""
    return words.to(torch.float64).add_(0.5).mul_(_TO_UNIT).to(torch.float32)


def _gauss(words: Tensor) -> Tensor:
    """(..., 4) words -> (..., 4) standard normals by Box-Muller on the pairs (0, 1) and (2, 3)."""
    unit = _unit(words)
    radius = torch.sqrt(-2.0 * torch.log(unit[..., 0::2]))
    angle = (2.0 * math.pi) * unit[..., 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(-2)


def _draw(keys: Tensor, start: int, count: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements [start, start + count) of each key's stream: (K,) keys -> (K, count) float32."""
    first, last = start // 4, (start + count + 3) // 4
    blocks = torch.arange(first, last, dtype=torch.int64, device=keys.device)
    values = transform(_philox(keys[:, None], blocks)).flatten(1)
    offset = start - 4 * first
    return values[:, offset : offset + count]


def _draw_spans(key: int, firsts: Tensor, length: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements [first, first + length) of a stream for every first: (R,) int64 -> (R, length) float32."""
    blocks = firsts[:, None] // 4 + torch.arange(length // 4 + 2, dtype=torch.int64, device=firsts.device)
    words = _philox(_single(key, firsts.device)[:, None], blocks.flatten())[0]
    values = transform(words).view(firsts.shape[0], -1)
    return values.gather(1, firsts[:, None] % 4 + torch.arange(length, device=firsts.device))


def _single(key: int, device: torch.device | str | None) -> Tensor:
    return torch.tensor([key], dtype=torch.int64, device=device)


def normal(key: int, shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Standard normals, float32 of ``shape``: elements ``start`` onward of the stream, in row-major order."""
    return _draw(_single(key, device), start, math.prod(shape), _gauss)[0].reshape(tuple(shape))


def uniform(key: int, shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Uniforms in (0, 1], float32 of ``shape``: elements ``start`` onward of the stream, in row-major order."""
    return _draw(_single(key, device), start, math.prod(shape), _unit)[0].reshape(tuple(shape))


def normal_spans(key: int, firsts: Tensor, length: int) -> Tensor:
    """Standard normals, float32 (R, length): of each run the stream's elements from ``firsts``, int64 (R,), onward."""
    return _draw_spans(key, firsts, length, _gauss)


def uniform_spans(key: int, firsts: Tensor, length: int) -> Tensor:
    """Uniforms in (0, 1], float32 (R, length): of each run the stream's elements from ``firsts`` onward."""
    return _draw_spans(key, firsts, length, _unit)


def batch_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals per sample: keys (B,) -> float32 (B, *shape), on the device of ``keys``."""
    return _draw(keys, 0, math.prod(shape), _gauss).reshape(keys.shape[0], *shape)


def batch_uniform(keys: Tensor) -> Tensor:
    """A uniform in (0, 1] per sample: keys (B,) -> float32 (B,), on the device of ``keys``."""
    return _draw(keys, 0, 1, _unit).reshape(keys.shape[0])


def permutation(key: int, size: int) -> Tensor:
    """A permutation of ``range(size)``: int64 (size,), the stable order of one keyed 64-bit word per element."""
    words = _philox(_single(key, None)[:, None], torch.arange(size, dtype=torch.int64))[0]
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)
