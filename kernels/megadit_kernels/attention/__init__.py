"""Attention whose samples use a part of their rows, by flash kernels, which take lengths and no mask (``flash``).

A flash kernel for sequences of several lengths reads rows that lie one after the other, and where each sequence begins.
The rows of a batch, (B, S), do lie so. Hence each sample is two sequences, the rows in use and the padding behind them:
no row is moved, each belongs to a sequence and so is written, and all shapes are constant.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op

LARGEST_HEAD_DIM = 256
FLASH_DTYPES = (torch.bfloat16, torch.float16)


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, heads, T, d), k and v (B, heads, S, d) -> (B, heads, T, d).

    mask: bool, True where a key is attended to, broadcast to (B, heads, T, S).
    cu_q, cu_k: instead of a mask, the ``cumulative_lengths`` of queries and keys: a sample's queries in use attend to
    its keys in use, and the other queries to the other keys. A query without a key gives 0.
    """
    if cu_q is not None and cu_k is not None:
        mask = (_in_use(cu_q, q.shape[2])[:, :, None] == _in_use(cu_k, k.shape[2])[:, None])[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask)


def cumulative_lengths(used: Tensor, rows: int) -> Tensor:
    """Where sequences begin and end, int32 (2 B + 1,): of each sample's ``rows`` rows the first ``used`` (B,), and the
    others."""
    ends = torch.arange(1, len(used) + 1, dtype=torch.int32, device=used.device) * rows
    within = torch.stack([ends - rows + used.to(torch.int32), ends], dim=1)
    return F.pad(within.flatten(), (1, 0))


def attends_without_mask(x: Tensor, head_dim: int) -> bool:
    """Whether heads of x's device and dtype are attended to by a flash kernel for several lengths."""
    return _flash_takes(x, head_dim) and attention.function_on(x.device.type) is not attention.reference


def _in_use(cu: Tensor, rows: int) -> Tensor:
    """Which rows are in use, bool (B, rows)."""
    return torch.arange(rows, device=cu.device) < (cu[1::2] - cu[:-1:2])[:, None]


def _flash_takes(x: Tensor, head_dim: int) -> bool:
    return x.dtype in FLASH_DTYPES and head_dim <= LARGEST_HEAD_DIM and x.device.type != "meta"


attention.implementation("sdpa", device=None, works=lambda: True)(attention.reference)


@attention.implementation("flash-attn", automatic=False)
def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    if mask is not None or not _flash_takes(q, q.shape[-1]):
        return attention.reference(q, k, v, mask, cu_q, cu_k)
    from megadit_kernels.attention.flash import by_flash_attn

    return by_flash_attn(q, k, v, cu_q, cu_k)


@attention.implementation("varlen")
def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    if cu_q is None or cu_k is None or not _flash_takes(q, q.shape[-1]):
        return attention.reference(q, k, v, mask, cu_q, cu_k)
    from megadit_kernels.attention.flash import by_torch

    return by_torch(q, k, v, cu_q, cu_k)
