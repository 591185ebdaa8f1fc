"""A kernel around the device functions of keyed noise, so that tests see their integers. Importing it needs Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadit_kernels.noise import triton_kernels as kernels

philox, unit, box_muller = kernels.philox, kernels.unit, kernels.box_muller


@triton.jit
def _words(key, counters, out, N: tl.constexpr):
    offsets = tl.arange(0, N)
    w0, w1, w2, w3 = philox(tl.load(key), tl.load(counters + offsets))
    tl.store(out + offsets * 4, w0.to(tl.int64))
    tl.store(out + offsets * 4 + 1, w1.to(tl.int64))
    tl.store(out + offsets * 4 + 2, w2.to(tl.int64))
    tl.store(out + offsets * 4 + 3, w3.to(tl.int64))


@triton.jit
def _numbers(words, uniforms, normals, N: tl.constexpr):
    offsets = tl.arange(0, N)
    w0 = tl.load(words + offsets * 2).to(tl.uint32)
    w1 = tl.load(words + offsets * 2 + 1).to(tl.uint32)
    tl.store(uniforms + offsets * 2, unit(w0))
    tl.store(uniforms + offsets * 2 + 1, unit(w1))
    n0, n1 = box_muller(w0, w1)
    tl.store(normals + offsets * 2, n0)
    tl.store(normals + offsets * 2 + 1, n1)


def words_of(key: int, counters: Tensor) -> Tensor:
    """The words of a key at int64 counters (N,), a power of two many, on their device: (N, 4) int64."""
    out = torch.empty(len(counters), 4, dtype=torch.int64, device=counters.device)
    _words[(1,)](torch.tensor([key], device=counters.device), counters, out, N=len(counters))
    return out


def numbers_of(words: Tensor) -> tuple[Tensor, Tensor]:
    """Uniforms and normals of pairs of words, int64 (N, 2), N a power of two: float32 (N, 2) each."""
    uniforms, normals = (torch.empty(words.shape, device=words.device) for _ in range(2))
    _numbers[(1,)](words, uniforms, normals, N=len(words))
    return uniforms, normals
