"""Sin-cos positions for inputs of several sizes: the centre of one large grid, or a grid stretched to the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megadit.models.layers.positions import sincos_2d_at


def _coordinates(count: int, base: int, device: torch.device) -> Tensor:
    """``count`` coordinates that span as much as ``base`` tokens of unit distance: float32 (count,)."""
    return torch.arange(count, dtype=torch.float32, device=device) / (count / base)


class CroppedPositions(nn.Module):
    """A fixed table added to the tokens of a grid of any size; no checkpoint holds it.

    With ``max_size`` the table is that of a square of so many tokens, its coordinates divided by max_size / base, and
    a grid gets the piece at its centre, as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2). Without, a grid
    gets its own table whose coordinates are stretched to span the base grid's.
    """

    table: Tensor

    def __init__(self, width: int, base: int, max_size: int | None = None) -> None:
        """``base``: side in tokens of the input that the model is made for."""
        super().__init__()
        self.width, self.base, self.max_size = width, base, max_size
        side = max_size or base
        self.register_buffer("table", torch.empty(side, side, width), persistent=False)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fill the table in place."""
        self.table.copy_(self._grid(*self.table.shape[:2]))

    def fits(self, rows: int, columns: int) -> bool:
        """Whether there are positions for a grid of this size."""
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
