"""Embedders of patches, timesteps and labels, and the way back from tokens to an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megadit.models.layers.linear import MuEmbedding, MuLinear, MuPatchProjection
from megadit.models.layers.positions import sincos_2d, timestep_features
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim


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

    def __init__(self, width: Dim, param: Parametrization, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(
            MuLinear(Dim(features), width, param, init="timestep", shard="column"),
            nn.SiLU(),
            MuLinear(width, width, param, init="timestep", shard="row"),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed t in [0, 1000]; its features are made in float32 whatever the weights' dtype."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(t, self.features).to(dtype))


class LabelEmbedder(nn.Module):
    """Class table with one more row for the null label ``num_classes``: int64 (B,) -> (B, n)."""

    def __init__(self, num_classes: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.embedding_table = MuEmbedding(num_classes + 1, width, param)

    def forward(self, labels: Tensor) -> Tensor:
        """Look the labels up; dropping them is the objective's business."""
        return self.embedding_table(labels)


class SinCosPositions(nn.Module):
    """A fixed table added to the tokens: a float32 buffer (1, T, n) that no checkpoint holds.

    ``scale``: what coordinates, 0 to ``side`` - 1, are divided by.
    """

    table: Tensor

    def __init__(self, width: int, side: int, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.side, self.scale = width, side, scale
        self.register_buffer("table", torch.empty(1, side * side, width), persistent=False)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fill the table in place."""
        table = sincos_2d(self.width, self.side, self.side, device=self.table.device, scale=self.scale)
        self.table.copy_(table[None])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, n) -> (B, T, n)."""
        return tokens + self.table.to(tokens.dtype)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int, channels: int) -> Tensor:
    """(B, rows * columns, p * p * C), each token ordered (row, column, channel) -> (B, C, rows * p, columns * p)."""
    grid = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, channels)
    image = torch.permute(grid, (0, 5, 1, 3, 2, 4))
    return image.reshape(tokens.shape[0], channels, rows * patch, columns * patch)
