"""Attention: of tokens to themselves, of tokens to text, and of two streams to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from megadit.models.layers.norm import MuRMSNorm, Precision, at_precision
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
        self.local_heads = tensor_layout().local_size(heads, "attention heads")
        self.precision = precision
        tripled = Dim(3 * width.size, 3 * width.base_size)
        self.qkv = ColumnParallelLinear(width, tripled, param, bias=qkv_bias, parts=3, tokens=tokens)
        gain = Dim(self.head_dim)
        self.q_norm = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.k_norm = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.proj = RowParallelLinear(width, width, param, tokens=tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, n) -> (B, T, n); mask as in ``attend``."""
        qkv = self.qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(q, k, v, mask, self.precision)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to text, scale 1 / sqrt(head_dim).

    ``kv_linear`` puts out k, v, each [heads, head_dim]; ``proj`` starts at zero, so that text enters with training.
    Tensor parallelism shares out the heads; ``tokens``, those of x: see ``MuLinear``.
    """

    def __init__(
        self,
        width: Dim,
        heads: int,
        param: Parametrization,
        *,
        bias: bool = True,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = width.size // heads
        self.local_heads = tensor_layout().local_size(heads, "attention heads")
        doubled = Dim(2 * width.size, 2 * width.base_size)
        self.q_linear = ColumnParallelLinear(width, width, param, bias=bias, tokens=tokens)
        self.kv_linear = ColumnParallelLinear(width, doubled, param, bias=bias, parts=2, skip_input_grad_reduce=True)
        self.proj = RowParallelLinear(width, width, param, init="zero", tokens=tokens)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, n), text (B, L, n), mask bool (B, L), True where there is a token -> (B, T, n).

        What stands in masked places of ``text`` has no weight at all, provided that it is finite. Each sample must
        have at least one token.
        """
        q = self.q_linear(x).unflatten(-1, (self.local_heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_linear(text).unflatten(-1, (2, self.local_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = None if mask is None else mask[:, None, None, :]
        mixed = attend(q, k, v, seen)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class StreamAttention(nn.Module):
    """One stream's side of a joint attention: its queries, keys and values, and the projection of what comes back.

    ``qkv`` puts out q, k, v, each [heads, head_dim]; with ``qk_norm`` q and k pass an RMSNorm over head_dim whose gain
    all heads share. ``pre_only``: the stream is read and gets nothing back, so that there is no ``proj``. Tensor
    parallelism shares out the heads; ``tokens``: see ``MuLinear``.
    """

    def __init__(
        self,
        width: Dim,
        heads: int,
        param: Parametrization,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        pre_only: bool = False,
        norm_precision: Precision = "auto",
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = width.size // heads
        self.local_heads = tensor_layout().local_size(heads, "attention heads")
        tripled, gain = Dim(3 * width.size, 3 * width.base_size), Dim(self.head_dim)
        self.qkv = ColumnParallelLinear(width, tripled, param, bias=qkv_bias, parts=3, tokens=tokens)
        self.ln_q = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.ln_k = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.proj = None if pre_only else RowParallelLinear(width, width, param, tokens=tokens)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, n) -> q, k, v, each (B, T, heads, head_dim); under sequence parallelism from a rank's own tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim)).unbind(2)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v

    def project(self, mixed: Tensor) -> Tensor:
        """What attention gave this stream, (B, T, heads, head_dim) -> (B, T, n). Not for a pre-only stream."""
        assert self.proj is not None
        return self.proj(mixed.flatten(2))


def joint_attention(
    image: tuple[Tensor, Tensor, Tensor],
    context: tuple[Tensor, Tensor, Tensor],
    seen: Tensor | None = None,
    *,
    answer_context: bool = True,
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens to all: q, k, v of T image tokens and L context tokens, each (B, T or L, heads, d).

    seen: bool (B, 1, 1, T + L), True where a key is seen; the image's always are. Returns what the image and the
    context get, (B, T, heads, d) and (B, L, heads, d). Without ``answer_context`` the context's queries are not
    asked, and L is 0 in the answer; they still get a gradient, which is zero, so that every parameter has one.
    """
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image, context, strict=True))
    tokens = image[0].shape[1]
    if not answer_context:
        q = q[:, :, :tokens]
    mixed = attend(q, k, v, seen, precision).transpose(1, 2)
    to_image, to_context = mixed.split([tokens, mixed.shape[1] - tokens], dim=1)
    return to_image, to_context


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, precision: Precision = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, heads, T, d), k and v (B, heads, S, d) -> (B, heads, T, d).

    mask: bool, True where a key is seen, broadcast to (B, heads, T, S); each query must see one. ``precision`` fp32
    computes in float32 whatever the operands are.
    """
    return at_precision(precision, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), q, k, v)
