"""Fixed sin-cos position tables, for one grid size or any, and sinusoidal timestep features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
    return sincos_2d_at(dim, row / scale, column / scale)


def sincos_2d_at(dim: int, row: Tensor, column: Tensor) -> Tensor:
    """``sincos_2d`` at the given coordinates of each token, float32 (T,), on their device -> (T, dim) float32."""
    return torch.cat([_axis_table(dim // 2, column), _axis_table(dim // 2, row)], dim=1).float()


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] features of t: (B,) in [0, 1000] -> (B, dim) float32, freq_i = exp(-ln(10000) i / (dim / 2)).

    Always computed in float32: half precision cannot tell neighbouring timesteps apart.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class SinCosPositions(nn.Module):
    """A fixed table added to the tokens: a float32 buffer (1, T, n) that is not in checkpoints.

    ``scale``: divisor of the coordinates, 0 to ``side`` - 1.
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


def _coordinates(count: int, base: int, device: torch.device) -> Tensor:
    """``count`` coordinates that span ``base`` tokens of unit distance: float32 (count,)."""
    return torch.arange(count, dtype=torch.float32, device=device) / (count / base)


class CroppedPositions(nn.Module):
    """A fixed table added to the tokens of a grid of any size; it is not in checkpoints.

    With ``max_size`` the table is that of a square of max_size x max_size tokens, its coordinates divided by
    max_size / base, and a grid uses the crop at its centre, as in Stable Diffusion 3 (arXiv 2403.03206, section
    5.3.2). Without, each grid has its own table, whose coordinates are stretched to span those of the base grid.
    """

    table: Tensor

    def __init__(self, width: int, base: int, max_size: int | None = None) -> None:
        """``base``: side, in tokens, of the grid of ``model.input_size``."""
        super().__init__()
        self.width, self.base, self.max_size = width, base, max_size
        side = max_size or base
        self.register_buffer("table", torch.empty(side, side, width), persistent=False)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fill the table in place."""
        self.table.copy_(self._grid(*self.table.shape[:2]))

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the table has positions for a grid of this size."""
        return self.max_size is None or max(rows, columns) <= self.max_size

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """(B, rows * columns, n) -> the same, tokens row-major."""
        if self.max_size is not None:
            top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
            table = self.table[top : top + rows, left : left + columns]
        elif (rows, columns) == (self.base, self.base):
            table = self.table
        else:
            table = self._grid(rows, columns)
        return tokens + table.reshape(1, rows * columns, self.width).to(tokens.dtype)

    def _grid(self, rows: int, columns: int) -> Tensor:
        device = self.table.device
        row, column = (_coordinates(count, self.base, device) for count in (rows, columns))
        table = sincos_2d_at(self.width, row.repeat_interleave(columns), column.repeat(rows))
        return table.view(rows, columns, self.width)
