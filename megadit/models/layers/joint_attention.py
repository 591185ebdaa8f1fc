"""Attention over two streams of tokens at once, each with its own weights (MMDiT, arXiv 2403.03206, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megadit.models.layers.attention import attend
from megadit.models.layers.linear import MuLinear
from megadit.models.layers.norm import MuRMSNorm, Precision
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.tensor import tensor_layout


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
        self.local_heads = tensor_layout().share(heads, "attention heads")
        tripled, gain = Dim(3 * width.size, 3 * width.base_size), Dim(self.head_dim)
        self.qkv = MuLinear(width, tripled, param, bias=qkv_bias, shard="column", parts=3, tokens=tokens)
        self.ln_q = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.ln_k = MuRMSNorm(gain, param, precision=norm_precision, of_heads=True) if qk_norm else None
        self.proj = None if pre_only else MuLinear(width, width, param, shard="row", tokens=tokens)

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
