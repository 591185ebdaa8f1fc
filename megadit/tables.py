"""Aligned tables of text, as commands print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, rule: bool = False) -> str:
    """Columns two spaces apart: the first ``left`` of them flush left, the others flush right.

    ``rule`` draws a line below the header. Cells keep their blanks, and no number is reformatted; what follows a line
    break in a cell stands on a further line of its row.
    """
    cells = [list(header), *map(list, rows)]
    if rule:
        cells.insert(1, ["-" * max(map(len, column)) for column in zip(*cells, strict=True)])
    # The header goes as a row: tabulate makes columns two characters wider than what it takes for a header.
    align = ["left" if column < left else "right" for column in range(len(header))]
    return tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align, preserve_whitespace=True)
