"""Self-attention over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.models.layers.linear import MuLinear
from megadit.models.layers.norm import MuRMSNorm, Precision, without_autocast
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.tensor import tensor_layout


class SelfAttention(nn.Module):
    """Multi-head attention, scale 1 / sqrt(head_dim): head_dim stays fixed and width scales by heads.

    ``qkv`` puts out q, k, v, each [heads, head_dim]; with ``qk_norm`` q and k pass an RMSNorm over head_dim
    whose gain all heads share. ``precision`` fp32 computes scores, softmax and their product with v in float32,
    ``norm_precision`` the norms. Tensor parallelism shares out the heads; ``tokens``: see ``MuLinear``.
    """

    def __init__(
        self,
        width: Dim,
        heads: int,
        param: Parametrization,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        precision: Precision = "auto",
        norm_precision: Precision = "auto",
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width.size // heads
        self.local_heads = tensor_layout().share(heads, "attention heads")
        self.precision = precision
        tripled = Dim(3 * width.size, 3 * width.base_size)
        self.qkv = MuLinear(width, tripled, param, bias=qkv_bias, shard="column", parts=3, tokens=tokens)
        gain = Dim(self.head_dim)
        self.q_norm = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.k_norm = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.proj = MuLinear(width, width, param, shard="row", tokens=tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, n) -> (B, T, n); mask as in ``attend``."""
        qkv = self.qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(q, k, v, mask, self.precision)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, precision: Precision = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, heads, T, d), k and v (B, heads, S, d) -> (B, heads, T, d).

    mask: bool, True where a key is seen, broadcast to (B, heads, T, S); each query must see one. ``precision`` fp32
    computes in float32 whatever the operands are.
    """
    if precision == "auto" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, mask)
    with without_autocast(q):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
