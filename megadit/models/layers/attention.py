"""Attention: of tokens to themselves, of tokens to text, and of two streams to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadit.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from megadit.models.layers.norm import HeadNormGain, Precision, at_precision, widens
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.tensor import tensor_layout
from megadit_kernels import attends_without_mask, attention, cumulative_lengths, qk_norm


class SelfAttention(nn.Module):
    """Multi-head attention, scale 1 / sqrt(head_dim): head_dim stays fixed and width scales by heads.

    ``qkv`` puts out q, k, v, each [heads, head_dim]; with ``qk_norm`` q and k pass an RMSNorm over head_dim
    whose gain all heads share. ``precision`` fp32 computes scores, softmax and their product with v in float32,
    ``norm_precision`` the norms. Tensor parallelism shards the heads; ``tokens``: see ``MuLinear``.
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
        self.precision, self.norm_precision = precision, norm_precision
        tripled = Dim(3 * width.size, 3 * width.base_size)
        self.qkv = ColumnParallelLinear(width, tripled, param, bias=qkv_bias, parts=3, tokens=tokens)
        gain = Dim(self.head_dim)
        self.q_norm = HeadNormGain(gain, param) if qk_norm else None
        self.k_norm = HeadNormGain(gain, param) if qk_norm else None
        self.proj = RowParallelLinear(width, width, param, tokens=tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, n) -> (B, T, n); mask as in ``attend``."""
        qkv = self.qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim))
        if self.q_norm is None or self.k_norm is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            float32 = widens(self.norm_precision, qkv)
            normed = qk_norm(qkv, None, (self.q_norm(), self.k_norm()), float32=float32)
            q, k, v = (part.transpose(1, 2) for part in normed)
        attended = attend(q, k, v, mask, self.precision)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to text, scale 1 / sqrt(head_dim).

    ``kv_linear`` puts out k, v, each [heads, head_dim]; ``proj`` starts at zero, so that text enters with training.
    Tensor parallelism shards the heads; ``tokens``, T of x: see ``MuLinear``.
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

    def forward(self, x: Tensor, text: Tensor, key_padding: Tensor | None = None) -> Tensor:
        """x (B, T, n), text (B, L, n), key_padding as of ``attend`` -> (B, T, n).

        Padding of ``text`` has weight 0, provided that its features are finite. Each sample must have a token.
        """
        q = self.q_linear(x).unflatten(-1, (self.local_heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_linear(text).unflatten(-1, (2, self.local_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = attend(q, k, v, key_padding)
        return self.proj(attended.transpose(1, 2).flatten(2))


class StreamQKV(NamedTuple):
    """q, k, v of a stream as its projection puts them out, (B, T, 3, heads, d), and the gains (d,) of q's and k's norm.

    ``widens``: the norm is computed in float32 and rounded once.
    """

    qkv: Tensor
    gains: tuple[Tensor, Tensor] | None
    widens: bool


class StreamAttention(nn.Module):
    """One stream's side of a joint attention: the projections of its queries, keys and values, and of its output.

    ``qkv`` puts out q, k, v, each [heads, head_dim]; with ``qk_norm`` q and k pass an RMSNorm over head_dim whose gain
    all heads share. ``pre_only``: the stream has no output, so that there is no ``proj``. Tensor parallelism shards the
    heads; ``tokens``: see ``MuLinear``.
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
        self.head_dim, self.norm_precision = width.size // heads, norm_precision
        self.local_heads = tensor_layout().local_size(heads, "attention heads")
        tripled, gain = Dim(3 * width.size, 3 * width.base_size), Dim(self.head_dim)
        self.qkv = ColumnParallelLinear(width, tripled, param, bias=qkv_bias, parts=3, tokens=tokens)
        self.ln_q = HeadNormGain(gain, param) if qk_norm else None
        self.ln_k = HeadNormGain(gain, param) if qk_norm else None
        self.proj = None if pre_only else RowParallelLinear(width, width, param, tokens=tokens)

    def forward(self, x: Tensor) -> StreamQKV:
        """(B, T, n) -> q, k, v of T tokens; under sequence parallelism from a rank's own tokens."""
        qkv = self.qkv(x).unflatten(-1, (3, self.local_heads, self.head_dim))
        gains = None if self.ln_q is None or self.ln_k is None else (self.ln_q(), self.ln_k())
        return StreamQKV(qkv, gains, widens(self.norm_precision, qkv))

    def project(self, attended: Tensor) -> Tensor:
        """The attention's output for this stream, (B, T, heads, head_dim) -> (B, T, n). Not of a pre-only stream."""
        assert self.proj is not None
        return self.proj(attended.flatten(2))


def joint_attention(
    image: StreamQKV,
    context: StreamQKV,
    key_padding: Tensor | None = None,
    *,
    context_queries: bool = True,
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens to all: T of the image and L of the context, whose queries and keys are normed here.

    key_padding as of ``attend``; the image has none. Returns the outputs of the image and of the context,
    (B, T, heads, d) and (B, L, heads, d), of which those at padding mean nothing. Without ``context_queries`` the
    context's are not computed, and L is 0 in the output; the gradient of its queries is zero then and not missing, so
    that every parameter has one.
    """
    normed = qk_norm(
        image.qkv, context.qkv, image.gains, context.gains, context_queries=context_queries, float32=image.widens
    )
    q, k, v = (part.transpose(1, 2) for part in normed)
    tokens = image.qkv.shape[1]
    if not context_queries and key_padding is not None and _is_lengths(key_padding):
        key_padding = torch.stack([_all_in_use(tokens, tokens, q), key_padding.select(0, 1)])
    attended = attend(q, k, v, key_padding, precision).transpose(1, 2)
    of_image, of_context = attended.split([tokens, attended.shape[1] - tokens], dim=1)
    return of_image, of_context


def attend(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None, precision: Precision = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, heads, T, d), k and v (B, heads, S, d) -> (B, heads, T, d).

    key_padding: a mask, bool, True where a key is attended to, broadcast to (B, heads, T, S), for each query at least
    one; or lengths, int32 (2, 2 B + 1), ``cumulative_lengths`` of queries and of keys. ``precision`` fp32 computes in
    float32 whatever the operands are.
    """
    mask, cu_q, cu_k = key_padding, None, None
    if key_padding is not None and _is_lengths(key_padding):
        mask, (cu_q, cu_k) = None, key_padding.unbind(0)
    return at_precision(precision, lambda q, k, v: attention(q, k, v, mask, cu_q, cu_k), q, k, v)


def text_padding(
    text: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    x: Tensor,
    head_dim: int,
    *,
    keys_before: int = 0,
    queries: int | None = None,
    precision: Precision = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Text (B, L, F) and its padding among the keys of all blocks, as ``attend`` takes it; None where there is none.

    mask bool (B, L), True for tokens; lengths int32 (B,), of tokens before all padding, None where they are not known.
    x: tokens, (B, T, n) of any T, whose dtype and device say whether a flash kernel takes lengths. keys_before: keys
    before the text's, all in use; queries: their number, None where they are the keys.

    For a flash kernel tokens of the text that stand behind padding are moved before it: a text without positions means
    the same in any order. Nothing here waits for the device.
    """
    if mask is None:
        return text, None
    if precision == "fp32" or not attends_without_mask(x, head_dim):
        if keys_before:
            mask = torch.cat([mask.new_ones(len(mask), keys_before), mask], dim=1)
        return text, mask.unsqueeze(1).unsqueeze(1)
    if lengths is None:
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        text, lengths = text.gather(1, order.unsqueeze(-1).expand_as(text)), mask.sum(dim=1, dtype=torch.int32)
    keys = cumulative_lengths(keys_before + lengths, keys_before + mask.shape[1])
    return text, torch.stack([keys if queries is None else _all_in_use(queries, queries, lengths), keys])


def _is_lengths(key_padding: Tensor) -> bool:
    return key_padding.dtype == torch.int32


def _all_in_use(used: int, rows: int, per_sample: Tensor) -> Tensor:
    """``cumulative_lengths`` of as many samples as ``per_sample`` has, each with ``used`` rows in use."""
    return cumulative_lengths(torch.full((len(per_sample),), used, dtype=torch.int32, device=per_sample.device), rows)
