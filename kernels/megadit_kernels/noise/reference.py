"""Keyed noise in plain torch: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller, and what is made of the noise.

A stream is named by a 64-bit key; its counter is the index of an element over four. ``megadit.rng`` says which streams
there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57  # Philox round multipliers
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_ROUNDS = 10
_TO_UNIT = 2.0**-32


def philox(keys: Tensor, blocks: Tensor) -> Tensor:
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


def unit(words: Tensor) -> Tensor:
    """uint32 words -> float32 in the open interval (0, 1]: never 0, so that log is finite."""
    return words.to(torch.float64).add_(0.5).mul_(_TO_UNIT).to(torch.float32)


def gauss(words: Tensor) -> Tensor:
    """(..., 4) words -> (..., 4) standard normals by Box-Muller on the pairs (0, 1) and (2, 3)."""
    uniform = unit(words)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(-2)


def draw(keys: Tensor, start: int, count: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Elements [start, start + count) of each key's stream: (K,) keys -> (K, count) float32."""
    first, last = start // 4, (start + count + 3) // 4
    blocks = torch.arange(first, last, dtype=torch.int64, device=keys.device)
    values = transform(philox(keys[:, None], blocks)).flatten(1)
    offset = start - 4 * first
    return values[:, offset : offset + count]


def keyed_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals: keys (B,) int64 -> float32 (B, *shape), the first of each key's stream in row-major order."""
    return draw(keys, 0, math.prod(shape), gauss).reshape(keys.shape[0], *shape)


def mix(x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """``mix_noise`` with noise that is there, float32 of the shape of x0."""
    each = (-1, *[1] * (x0.dim() - 1))
    a, b = signal.reshape(each), sigma.reshape(each)
    x = a * x0 + b * noise
    if target == "noise":
        return x, noise
    return x, noise - x0 if target == "velocity" else a * noise - b * x0


def mix_noise(x0: Tensor, keys: Tensor, signal: Tensor, sigma: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """Noisy samples ``signal x0 + sigma noise``, and the target of the loss that trains on them.

    x0 (B, ...) float32; keys (B,) int64 of the streams of noise; signal, sigma (B,) float32; target: ``noise``,
    ``velocity``, noise - x0, or ``v``, signal noise - sigma x0. Gives two float32 tensors of the shape of x0.
    """
    return mix(x0, keyed_normal(keys, x0.shape[1:]), signal, sigma, target)


def squared_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean square of target - output per sample, times its weight: float32 (B,), computed in float32.

    output (B, ...) of any float dtype; target float32 of its shape; weight float32 (B,), a constant.
    """
    mean = (target - output.float()).square().flatten(1).mean(dim=1)
    return mean if weight is None else mean * weight
