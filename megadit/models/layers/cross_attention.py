"""Cross-attention of image tokens to text, and the embedder of captions that it attends to (PixArt-alpha)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import null_caption
from megadit.models.layers.attention import attend
from megadit.models.layers.linear import MuLinear
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.tensor import tensor_layout


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
        self.local_heads = tensor_layout().share(heads, "attention heads")
        doubled = Dim(2 * width.size, 2 * width.base_size)
        self.q_linear = MuLinear(width, width, param, bias=bias, shard="column", tokens=tokens)
        self.kv_linear = MuLinear(width, doubled, param, bias=bias, shard="column", parts=2, entered=True)
        self.proj = MuLinear(width, width, param, init="zero", shard="row", tokens=tokens)

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


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh), Linear on text features: (B, L, text_dim) -> (B, L, n)."""

    def __init__(self, text_dim: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.fc1 = MuLinear(Dim(text_dim), width, param, init="text", shard="column")
        self.fc2 = MuLinear(width, width, param, init="text", shard="row")

    def forward(self, text: Tensor) -> Tensor:
        """Cast the features to the weights' dtype and project each token."""
        return self.fc2(F.gelu(self.fc1(text.to(self.fc1.weight.dtype)), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projection of captions, and the null caption ``y_embedding`` (max_length, text_dim).

    The null caption is a buffer that checkpoints hold and no optimizer trains; without one of its own a model has
    ``megadit.conditioning.null_caption``. Dropping captions is the objective's business.
    """

    y_embedding: Tensor

    def __init__(self, text_dim: int, max_length: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.y_proj = CaptionProjection(text_dim, width, param)
        self.register_buffer("y_embedding", torch.empty(max_length, text_dim))

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fill the null caption in place."""
        length, dim = self.y_embedding.shape
        self.y_embedding.copy_(null_caption(length, dim, self.y_embedding.device))

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, text_dim) -> (B, L, n)."""
        return self.y_proj(text)
