"""RMSNorm of queries and keys, written into the sequence that attention reads; on a GPU one kernel (``fused``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op, triton_runs

Gains = tuple[Tensor, Tensor]


@Op
def qk_norm(
    image: Tensor,
    context: Tensor | None = None,
    image_gains: Gains | None = None,
    context_gains: Gains | None = None,
    *,
    context_queries: bool = True,
    eps: float = 1e-6,
    float32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the joint sequence [image; context], q and k under each stream's own RMSNorm over d.

    image (B, T, 3, heads, d) and context (B, L, 3, heads, d) are the outputs of the streams' projections, in place;
    without a context there is one stream. gains: those of q and k, (d,) each, which all heads share; None: no norm.
    Returns q, k, v, each (B, T + L, heads, d); q (B, T, heads, d) without ``context_queries``, and then the gradients
    of the context's queries and of their gain are zero. ``float32``: the norm is computed in float32 and rounded once.
    """
    if context is None:  # heads first, as attention reads them
        q, k, v = image.permute(2, 0, 3, 1, 4).unbind(0)
        if image_gains is not None:
            q, k = (_rms_norm(part, gain, eps, float32) for part, gain in zip((q, k), image_gains, strict=True))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    streams = []
    for qkv, gains in ((image, image_gains), (context, context_gains)):
        q, k, v = qkv.unbind(2)
        if gains is not None:
            q, k = (_rms_norm(part, gain, eps, float32) for part, gain in zip((q, k), gains, strict=True))
        streams.append((q, k, v))
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
    if not context_queries:
        q = q.transpose(1, 2)[:, :, : image.shape[1]].transpose(1, 2)  # so that the gradient too lies heads first
    return q, k, v


def _rms_norm(x: Tensor, gain: Tensor, eps: float, float32: bool) -> Tensor:
    if not float32:
        return F.rms_norm(x, gain.shape, gain, eps)
    return F.rms_norm(x.float(), gain.shape, gain.float(), eps).to(x.dtype)


qk_norm.implementation("torch", device=None, works=lambda: True)(qk_norm.reference)


@qk_norm.implementation("fused", works=triton_runs)
def _fused(
    image: Tensor,
    context: Tensor | None = None,
    image_gains: Gains | None = None,
    context_gains: Gains | None = None,
    *,
    context_queries: bool = True,
    eps: float = 1e-6,
    float32: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    from megadit_kernels.qk_norm.fused import run

    gains = (*(image_gains or (None, None)), *(context_gains or (None, None)))
    q, k, v = run(image, context, *gains, context_queries, eps)
    return q, k, v
