"""CUDA tensors without a GPU: FakeTensorMode, with what it lacks on a CPU build of torch.

Shapes, strides, dtypes and devices are those of a GPU, there are no values. Only under ``no_grad``: there ``F.linear``
works, with gradients it aborts the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megadit_kernels import OPS, backends
from megadit_kernels.registry import Op


@torch.library.custom_op("megadit_tests::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, mask)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, T, d) with heads and channels of a token side by side, as flash attention lays it out."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """torch's own raises for fake CUDA tensors, since it asks the GPU which kernel to take."""
    assert not any(options.values()), "the stand-in knows no causal or dropped attention"
    return _attention(query, key, value, attn_mask)


def _getitem_without_cuda(self: FakeTensor, index: Any) -> Tensor:
    """Slices of fake CUDA tensors; torch's own sets the CUDA device first, which a CPU build refuses."""
    if self.device.type != "cuda":
        return Tensor.__getitem__(self, index)
    parts = index if isinstance(index, tuple) else (index,)
    out, dim = self, 0
    for at, part in enumerate(parts):
        if part is Ellipsis:
            dim = out.dim() - sum(rest is not None for rest in parts[at + 1 :])
        elif part is None:
            out, dim = out.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            out, dim = torch.ops.aten.slice(out, dim, part.start, part.stop, part.step or 1), dim + 1
        elif isinstance(part, int):
            out = out.select(dim, part)
        else:
            raise TypeError(f"an index of {type(part).__name__} on a fake CUDA tensor")
    return out


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, ``device="cuda"`` makes fake tensors, and dispatch is that of a GPU with Triton and varlen_attn."""
    ops = [_op(name) for name in OPS]
    works = backends.works
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "works", lambda name: name in ("triton", "cuda", "varlen") or works(name))
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _scaled_dot_product_attention)
        # Not of Tensor: Python would take it for a sequence ever after, and torch.tensor([tensor, 1.0]) would fail.
        patch.setattr(FakeTensor, "__getitem__", _getitem_without_cuda)
        for op in ops:
            op.select("auto")
        try:
            with FakeTensorMode() as mode, torch.no_grad():
                yield mode
        finally:
            for op in ops:
                op.select("auto")


def _op(name: str) -> Op[Any, Any]:
    from megadit.registry import load_object

    op: Op[Any, Any] = load_object(OPS[name])
    return op


def like(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Inside ``fake_cuda``: a fake CUDA tensor of value's shape and strides, and of its dtype where none is given."""
    if value is None:
        return None
    return torch.empty_strided(value.shape, value.stride(), dtype=dtype or value.dtype, device="cuda")


def to_fake_cuda(model: nn.Module, dtype: torch.dtype) -> None:
    """Inside ``fake_cuda``: give a model of the meta device fake CUDA parameters of ``dtype``, and fake buffers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = like(buffer)
