"""The smallest Triton kernel: it tells whether Triton compiles and launches here. Imported by its probe only."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double(x, y, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    inside = at < n
    tl.store(y + at, 2.0 * tl.load(x + at, mask=inside), mask=inside)


def double(x: Tensor) -> Tensor:
    """2 x for a flat float32 CUDA tensor of at most 64 elements."""
    out = x.new_empty(x.shape)
    _double[(1,)](x, out, x.numel(), block=64)
    return out
