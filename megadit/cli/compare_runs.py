"""Compare two runs, or two sets of seeds: the gap of their losses, where it changes sign, and who is how much faster.

A and B are run directories (a study's trials too); several with commas between are seeds, shown as mean and band.
Writes compare.png and compare.json to --out. The gap is B - A, lower being better; "B reaches A's final loss at step
s of A's S" is a speed-up of S / s. Runs that log at different intervals are compared where both logged, over the same
windows; where the batches differ, everything is told over samples too.

python tools/compare_runs.py runs/sp-0,runs/sp-1 runs/mup-0,runs/mup-1 --key val_loss --out runs/sp-against-mup
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadit.errors import EXIT_OK, UserError, say
from megadit.streams import result_is_saved


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("a", metavar="A[,A2,…]", help="run directory, or several (seeds)")
    p.add_argument("b", metavar="B[,B2,…]", help="run directory, or several (seeds)")
    p.add_argument("--key", default="loss", help="number of metrics.jsonl to compare: loss, val_loss, …; default loss")
    p.add_argument("--smooth", type=int, metavar="N", help="average over N points; default a twentieth of them")
    p.add_argument("--out", type=Path, metavar="DIR", help="default runs/compare/A-against-B, named by the runs")
    p.add_argument("--json", action="store_true", help="print compare.json's object instead of the sentences")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, write both files, print."""
    args = parser().parse_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/compare_runs.py")
    from megadit.compare.plot import plot_comparison
    from megadit.compare.runs import compare, describe, split_runs
    from megadit.files.paths import PNG, check_output

    result = compare(split_runs(args.a), split_runs(args.b), args.key, args.smooth)
    first, second = (side[0].name.replace(" ", "-") for side in (result.a, result.b))
    out: Path = args.out or Path("runs") / "compare" / f"{first}-against-{second}"
    plain = result.to_json()
    check_output(out / "compare.json", "--out", "comparison", (b'{"key"',))
    check_output(out / "compare.png", "--out", "PNG picture", PNG)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")
        plot_comparison(result, out / "compare.png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another folder") from error
    result_is_saved(as_json=args.json)
    print(json.dumps(plain, allow_nan=False) if args.json else f"{describe(result)}\nwritten to {out}")
    if args.json:
        say(f"written to {out}")
    return EXIT_OK
