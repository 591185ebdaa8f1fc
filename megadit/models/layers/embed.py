"""Learned tables and tokens, the embedders of patches, timesteps, labels and captions, and ``unpatchify``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import null_caption
from megadit.models.layers.conv import MuPatchProjection
from megadit.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from megadit.models.layers.positions import timestep_features
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim, ParamSpec
from megadit_kernels import bias_gelu

_TIMESTEP_FEATURES = 256


class MuEmbedding(nn.Module):
    """A table (entries, n) whose rows are looked up and scaled by the role's multiplier."""

    def __init__(self, entries: int, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((Dim(entries), dim), "table", table=True)}
        self.weight = nn.Parameter(torch.empty(entries, dim.size))

    def forward(self, index: Tensor) -> Tensor:
        """int64 (B,) -> (B, n)."""
        row = F.embedding(index, self.weight)
        mult = self.param_specs["weight"].forward_mult
        return row if mult == 1.0 else row * mult


class MuTokens(nn.Module):
    """Learned vectors (1, count, n) that are added to tokens or stand among them (positions, registers)."""

    def __init__(self, count: int, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((Dim(1), Dim(count), dim), "tokens", table=True)}
        self.weight = nn.Parameter(torch.empty(1, count, dim.size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add them: (B, count, n) -> (B, count, n)."""
        mult = self.param_specs["weight"].forward_mult
        return torch.add(tokens, self.weight.to(tokens.dtype), alpha=mult)


class PatchEmbedder(nn.Module):
    """Image to tokens: (B, C, H, W) -> (B, T, n)."""

    def __init__(self, channels: int, width: Dim, patch: int, param: Parametrization) -> None:
        super().__init__()
        self.proj = MuPatchProjection(channels, width, patch, param)

    def forward(self, x: Tensor) -> Tensor:
        """Cast the image to the weights' dtype and project its patches, tokens row-major."""
        return self.proj(x.to(self.proj.weight.dtype))


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, Linear on sinusoidal features of t: (B,) -> (B, n)."""

    def __init__(self, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            ColumnParallelLinear(Dim(_TIMESTEP_FEATURES), width, param, init="timestep"),
            nn.SiLU(),
            RowParallelLinear(width, width, param, init="timestep"),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed t in [0, 1000]; its features are made in float32 whatever the weights' dtype."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(t, _TIMESTEP_FEATURES).to(dtype))


class LabelEmbedder(nn.Module):
    """Class table with one more row for the null label ``num_classes``: int64 (B,) -> (B, n)."""

    def __init__(self, num_classes: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.embedding_table = MuEmbedding(num_classes + 1, width, param)

    def forward(self, labels: Tensor) -> Tensor:
        """Look the labels up; the objective has dropped some of them."""
        return self.embedding_table(labels)


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh), Linear on text features: (B, L, text_dim) -> (B, L, n)."""

    def __init__(self, text_dim: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(Dim(text_dim), width, param, init="text")
        self.fc2 = RowParallelLinear(width, width, param, init="text")

    def forward(self, text: Tensor) -> Tensor:
        """Cast the features to the weights' dtype and project each token."""
        return self.fc2(self.fc1(text.to(self.fc1.weight.dtype), bias_gelu, approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projection of captions, and the null caption ``y_embedding`` (max_length, text_dim).

    The null caption is a buffer that checkpoints hold and no optimizer trains, by default
    ``megadit.conditioning.null_caption``. The objective drops captions, not this module.
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


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int, channels: int) -> Tensor:
    """(B, rows * columns, p * p * C), each token ordered (row, column, channel) -> (B, C, rows * p, columns * p)."""
    grid = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, channels)
    image = torch.permute(grid, (0, 5, 1, 3, 2, 4))
    return image.reshape(tokens.shape[0], channels, rows * patch, columns * patch)
