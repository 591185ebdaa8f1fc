#!/usr/bin/env python
"""How far every kind of layout is from one process after five steps: the table of docs/parallel.md.

OMP_NUM_THREADS=1 python benchmarks/layout_differences.py [family …]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "tests")]

KINDS = ("loss", "norm", "norms by role", "gradients", "weights", "average")


def main(families: list[str]) -> None:
    """Print a row per layout, the worst of the families, and one per family and layout."""
    from helpers.layouts.matrix import FAMILIES, LAYOUTS, Matrix, drifts, gaps

    worst: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        for family in families or FAMILIES:
            for layout in LAYOUTS:
                results, expected = matrix.spread(family, layout)
                found = gaps(results, expected)
                print(family, _row(layout, found), drifts(results, layout) or "", flush=True)
                known = worst.setdefault(layout, dict.fromkeys(KINDS, 0.0))
                worst[layout] = {kind: max(known[kind], found[kind]) for kind in KINDS}
    print(f"| layout | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for layout, found in worst.items():
        print(_row(layout, found))


def _row(layout: str, found: dict[str, float]) -> str:
    return f"| {layout} | {' | '.join(f'{found[kind]:.0e}' for kind in KINDS)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
