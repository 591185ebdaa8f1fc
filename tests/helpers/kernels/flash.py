"""Flash attention on the CPU: torch's own operator with a kernel in plain torch, and stand-ins of flash-attn 2 and 3.

The stand-ins have the signatures, operators and results of flash_attn 2.8.4 and flash_attn_interface 3.0 (August 2026).
``flash_on_cpu`` makes ``attention`` run one of them, whatever the dtype.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megadit_kernels import attention
from megadit_kernels.attention import flash
from megadit_kernels.attention.flash import FLASH_ATTN

CALLS: list[tuple[str, tuple[int, ...]]] = []  # kernels that ran, and the shape of their q
BACKENDS = ("varlen", "flash-attn 2", "flash-attn 3")


def _sequences(
    cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, max_q: int, max_k: int
) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows of each sequence. A kernel reads beyond, or leaves out, what these assertions forbid."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (q, k))
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    assert len(bounds_q) == len(bounds_k) and bounds_q[0] == bounds_k[0] == 0
    assert bounds_q[-1] == len(q) and bounds_k[-1] == len(k), "rows of no sequence are never written"
    for i in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        assert 0 <= rows_q.stop - rows_q.start <= max_q and 0 <= rows_k.stop - rows_k.start <= max_k
        yield rows_q, rows_k


def _wide(x: Tensor) -> Tensor:
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> Any:
    """out (rows, heads, d), and logsumexp (heads, rows) in float32."""
    CALLS.append(("forward", tuple(q.shape)))
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for rows, keys in _sequences(cu_q, cu_k, q, k, max_q, max_k):
        scores = _wide(q[rows]) @ _wide(k[keys]).transpose(1, 2) * scale
        lse[:, rows] = scores.logsumexp(-1).float()
        out[rows] = (scores.softmax(-1) @ _wide(v[keys])).transpose(0, 1).to(q.dtype)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Any:
    """Gradients of q, k and v."""
    CALLS.append(("backward", tuple(q.shape)))
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys in _sequences(cu_q, cu_k, q, k, max_q, max_k):
        p = (_wide(q[rows]) @ _wide(k[keys]).transpose(1, 2) * scale).softmax(-1)
        grad, dp = _wide(dout[rows]), _wide(dout[rows]) @ _wide(v[keys]).transpose(1, 2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        for target, part, value in (
            (dq, rows, ds @ _wide(k[keys])),
            (dk, keys, ds.transpose(1, 2) @ _wide(q[rows])),
            (dv, keys, p.transpose(1, 2) @ grad),
        ):
            target[part] = value.transpose(0, 1).to(q.dtype)
    return dq, dk, dv


@functools.cache
def _kernels_of_torch() -> None:
    """torch's operator of varlen_attn gets kernels for the CPU, where it has none."""
    from torch.nn.attention import varlen

    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any) -> Any:
        _is_causal, scale, window, *others = rest
        assert list(window) == [-1, -1] and not any(others)
        out, lse = forward(q, k, v, cu_q, cu_k, max_q, max_k, scale or q.shape[-1] ** -0.5)
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def run_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        cu_q, cu_k, max_q, max_k, _is_causal, _rng, scale, _window = rest
        return backward(dout, q, k, v, cu_q, cu_k, max_q, max_k, scale or q.shape[-1] ** -0.5)

    varlen._varlen_attn.register_kernel("cpu")(run)
    varlen._varlen_attn_backward.register_kernel("cpu")(run_backward)


def _operators(namespace: str, kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Operators with the names of a package's, for autograd functions as the package has them."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, cu_q, cu_k, max_q, max_k, scale)

    def run_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        for target, value in zip((dq, dk, dv), backward(dout, q, k, v, cu_q, cu_k, max_q, max_k, scale), strict=True):
            target.copy_(value)

    name = f"{namespace}::_flash_attn_{kind}"
    ahead = torch.library.custom_op(f"{name}forward", run, mutates_args=())
    back = torch.library.custom_op(f"{name}backward", run_backward, mutates_args=("dq", "dk", "dv"))
    ahead.register_fake(lambda q, k, v, *rest: (torch.empty_like(q), q.new_empty((q.shape[1], len(q)))))
    back.register_fake(lambda *args: None)
    return ahead, back


def _function(namespace: str, kind: str) -> Any:
    ahead, back = _operators(namespace, kind)

    class Varlen(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, scale: float
        ) -> Any:
            out, lse = ahead(q, k, v, cu_q, cu_k, max_q, max_k, scale)
            ctx.save_for_backward(q, k, v, cu_q, cu_k)
            ctx.numbers = max_q, max_k, scale
            return out, lse

        @staticmethod
        def backward(ctx: Any, dout: Any, _dlse: Any) -> Any:
            q, k, v, cu_q, cu_k = ctx.saved_tensors
            gradients = tuple(torch.empty_like(x) for x in (q, k, v))
            back(dout, q, k, v, cu_q, cu_k, *ctx.numbers, *gradients)
            return (*gradients, None, None, None, None, None)

    return Varlen.apply


def _dense(varlen: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """All rows as sequences of one length; q, k and v are (B, T or S, heads, d)."""
    samples, tokens, keys = len(q), q.shape[1], k.shape[1]
    cu_q = torch.arange(0, (samples + 1) * tokens, tokens, dtype=torch.int32)
    cu_k = torch.arange(0, (samples + 1) * keys, keys, dtype=torch.int32)
    out, lse = varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, tokens, keys, scale)
    return out.unflatten(0, (samples, tokens)), lse


@functools.cache
def flash_attn_2() -> ModuleType:
    """Stand-in of ``flash_attn.flash_attn_interface``."""
    module, varlen = ModuleType(FLASH_ATTN[1][0]), _function("flash_attn", "varlen_")

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        out, lse = _dense(varlen, q, k, v, softmax_scale or q.shape[-1] ** -0.5)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        scale = softmax_scale or q.shape[-1] ** -0.5
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
        return (out, lse, None) if return_attn_probs else out

    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    vars(module).update(_wrapped_flash_attn_varlen_forward=torch.ops.flash_attn._flash_attn_varlen_forward)
    return module


@functools.cache
def flash_attn_3(with_lse: bool = False) -> ModuleType:
    """Stand-in of ``flash_attn_interface``; its first releases returned (out, logsumexp) (``with_lse``)."""
    module, varlen = ModuleType(FLASH_ATTN[0][0]), _flash_attn_3_function()

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        out, lse = _dense(varlen, q, k, v, softmax_scale or q.shape[-1] ** -0.5)
        return (out, lse) if return_attn_probs or with_lse else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        scale = softmax_scale or q.shape[-1] ** -0.5
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
        return (out, lse) if return_attn_probs or with_lse else out

    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module


@functools.cache
def _flash_attn_3_function() -> Any:
    return _function("flash_attn_3", "")


@contextmanager
def flash_on_cpu(backend: str) -> Iterator[None]:
    """``attention`` on the CPU, with choice auto, runs ``backend``, one of ``BACKENDS``, for every floating dtype."""
    _kernels_of_torch()
    name, _, generation = backend.partition(" ")
    package = {"2": flash_attn_2, "3": flash_attn_3}.get(generation)
    module = importlib.import_module("megadit_kernels.attention")
    implementation = {"varlen": module._varlen, "flash-attn": module._flash_attn}[name]
    attention.implementation("stand-in", device="cpu", works=lambda: True)(implementation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FLASH_DTYPES", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
        if package is not None:
            patch.setattr(flash, "flash_attn_interface", package)
        CALLS.clear()
        try:
            yield
        finally:
            attention.discard("stand-in")
