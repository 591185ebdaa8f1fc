#!/usr/bin/env python
"""How far every kind of layout is from one process after five steps: the table of docs/parallel.md.

OMP_NUM_THREADS=1 python benchmarks/layout_differences.py [family …]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "tests")]

KINDS = ("loss", "norm", "norms by role", "gradients", "weights", "average")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row per family and layout, then one per layout: the worst of the families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all of them")
    args = parser.parse_args(argv)
    from helpers.layouts.matrix import FAMILIES, LAYOUTS, LayoutRuns, diverged_replicas, gaps

    unknown = [family for family in args.families if family not in FAMILIES]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    worst: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        matrix = LayoutRuns(Path(folder))
        for family in args.families or FAMILIES:
            for layout in LAYOUTS:
                results, expected = matrix.on_layout(family, layout)
                differences = gaps(results, expected)
                print(family, _row(layout, differences), diverged_replicas(results, layout) or "", flush=True)
                known = worst.setdefault(layout, dict.fromkeys(KINDS, 0.0))
                worst[layout] = {kind: max(known[kind], differences[kind]) for kind in KINDS}
    print(f"| layout | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for layout, differences in worst.items():
        print(_row(layout, differences))


def _row(layout: str, differences: dict[str, float]) -> str:
    return f"| {layout} | {' | '.join(f'{differences[kind]:.0e}' for kind in KINDS)} |"


if __name__ == "__main__":
    main()
