"""Flash kernels for sequences of several lengths: torch's own, and those of the package flash-attn 2 or 3.

All take rows, (rows, heads, d), with d a multiple of 8, of which a view of q, k and v is made where their strides
allow it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.attention import attention, cumulative_lengths

# Module and distribution of flash-attn 3, for Hopper, and 2.
FLASH_ATTN = (("flash_attn_interface", "flash_attn_3"), ("flash_attn.flash_attn_interface", "flash-attn"))
_MULTIPLE = 8  # of channels, which the kernels load 16 bytes at a time


def by_torch(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """``attention`` by ``torch.nn.attention.varlen``; under torch.compile an operator of torch's."""
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(_rows(q), _rows(k), _rows(v), cu_q, cu_k, q.shape[2], k.shape[2], scale=q.shape[-1] ** -0.5)
    return _heads_first(out, q)


def by_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    """``attention`` by flash-attn, with or without lengths."""
    return _by_flash_attn(q, k, v, cu_q, cu_k)


def keep_in_graphs() -> None:
    """From now on torch.compile puts the package's operators into its graphs, and does not look for them in the
    package's Python, which it cannot trace."""
    torch.compiler.allow_in_graph(_by_flash_attn)


def _by_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    return _by_package(flash_attn_interface(), q, k, v, cu_q, cu_k)


def _by_package(
    package: ModuleType, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> Tensor:
    options = {"softmax_scale": q.shape[-1] ** -0.5, "deterministic": torch.are_deterministic_algorithms_enabled()}
    out: Any
    if cu_q is None or cu_k is None:
        out = package.flash_attn_func(*(_padded(x.transpose(1, 2)) for x in (q, k, v)), **options)
    else:
        rows = (_rows(x) for x in (q, k, v))
        out = package.flash_attn_varlen_func(*rows, cu_q, cu_k, q.shape[2], k.shape[2], **options)
    return _heads_first(out[0] if isinstance(out, tuple) else out, q)  # early releases of 3 return the logsumexp too


@functools.cache
def flash_attn_interface() -> ModuleType:
    """The module of flash-attn 3 where it imports and its results on a GPU are right, else that of flash-attn 2.

    Raises what flash-attn 2 raises, or RuntimeError for a release before 2.7, whose kernels are no operators:
    torch.compile and selective recomputation cannot see them.
    """
    try:
        return _tried(FLASH_ATTN[0][0])
    except Exception:  # not installed, or built for another torch or GPU
        return _tried(FLASH_ATTN[1][0])


def _tried(name: str) -> ModuleType:
    package = importlib.import_module(name)
    if name == FLASH_ATTN[1][0] and not hasattr(package, "_wrapped_flash_attn_varlen_forward"):
        raise RuntimeError("this flash-attn is older than 2.7")
    if torch.cuda.is_available():
        try_kernel(functools.partial(_by_package, package), "cuda")
    return package


def try_kernel(kernel: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], device: str) -> None:
    """Compare a kernel, forward and backward, with the reference: a sample with padding and a full one.

    Raises:
        AssertionError: a result is wrong, as of a kernel for another architecture.
    """
    rows, width = 16, 64
    cu = cumulative_lengths(torch.tensor([5, rows], device=device), rows)
    operands = torch.randn(3, 2, 2, rows, width, device=device, dtype=torch.bfloat16)
    results = []
    for function in (kernel, lambda q, k, v, cu_q, cu_k: attention.reference(q, k, v, None, cu_q, cu_k)):
        leaf = operands.clone().requires_grad_()
        q, k, v = leaf.unbind()
        out = function(q, k, v, cu, cu)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf)
        results.append((out, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def _rows(x: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B T, heads, d'), d' the next multiple of 8: a view where x's strides allow it."""
    return _padded(x.transpose(1, 2).flatten(0, 1))


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _MULTIPLE
    return F.pad(x, (0, missing)) if missing else x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(out: Tensor, q: Tensor) -> Tensor:
    """(B T, heads, d') or (B, T, heads, d') -> (B, heads, T, d), a view."""
    samples, heads, tokens, width = q.shape
    return out.view(samples, tokens, heads, -1).narrow(-1, 0, width).transpose(1, 2)
