"""Fixed position tables and timestep features."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _axis_table(dim: int, coordinate: Tensor) -> Tensor:
    """[sin, cos] of one coordinate: (T,) float32 -> (T, dim) float64, omega_i = 10000^-(i / (dim / 2))."""
    index = torch.arange(dim // 2, dtype=torch.float64, device=coordinate.device)
    angle = coordinate.double()[:, None] * torch.pow(10000.0, -index / (dim / 2.0))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(
    dim: int, rows: int, columns: int, device: torch.device | str | None = None, scale: float = 1.0
) -> Tensor:
    """2-D sin-cos table (rows * columns, dim), float32, tokens row-major; ``dim`` is a multiple of 4.

    The first half of the channels encodes the column, the second half the row (official DiT, pos_embed.py).
    Coordinates are divided by ``scale`` (the lewei scale of official PixArt).
    """
    row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
    return torch.cat([_axis_table(dim // 2, column / scale), _axis_table(dim // 2, row / scale)], dim=1).float()


def sincos_2d_at(dim: int, row: Tensor, column: Tensor) -> Tensor:
    """``sincos_2d`` at the given coordinates of each token, float32 (T,), on their device -> (T, dim) float32."""
    return torch.cat([_axis_table(dim // 2, column), _axis_table(dim // 2, row)], dim=1).float()


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """[cos, sin] features of t: (B,) in [0, 1000] -> (B, dim) float32, freq_i = exp(-ln(10000) i / (dim / 2)).

    Always computed in float32: at half precision neighbouring timesteps would fall together.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
