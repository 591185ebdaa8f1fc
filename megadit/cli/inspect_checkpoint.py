"""Look at a checkpoint: summary, verification, difference from another.

CHECKPOINT is a folder such as RUN/checkpoints/step-00001000, or a run directory for its latest. --verify reads every
byte and compares checksums; exit code 3 when something is not as it was written, also when a run's newest is broken and
an earlier one was read in its place. --diff compares every tensor and the counters; exit code 3 when a run would not go
on from both alike (config differences are listed and do not count).

python tools/inspect_checkpoint.py runs/emoji --verify
python tools/inspect_checkpoint.py runs/a --diff runs/b
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK, EXIT_VERDICT_NO


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder or run directory")
    p.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    p.add_argument("--diff", metavar="OTHER", help="compare with another checkpoint folder or run directory")
    p.add_argument("--norms", action="store_true", help="shape and L2 norms of every parameter")
    add_plugins(p)
    p.add_argument("--json", action="store_true", help="print one JSON object: summary, problems, diff")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the checkpoint is sound and, with ``--diff``, equal to the other."""
    args = parser().parse_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/inspect_checkpoint.py")
    import_plugins(args)
    from megadit.checkpoint.names import check_checkpoint_path

    for path in filter(None, (args.checkpoint, args.diff)):
        check_checkpoint_path(path, "checkpoint")  # refused before torch is imported
    from megadit.checkpoint import inspect
    from megadit.checkpoint.format import BrokenCheckpoint

    try:
        opened = inspect.open_for_inspection(args.checkpoint)
        stored = opened.stored
        report: dict[str, Any] = {"summary": inspect.summary(stored, args.norms)}
    except BrokenCheckpoint as error:
        if not args.verify:
            raise
        print(json.dumps({"problems": [str(error)]}) if args.json else error)
        return EXIT_VERDICT_NO
    lines = [inspect.describe_summary(report["summary"])]
    code = EXIT_OK
    if args.verify:
        report["problems"] = [*opened.problems, *inspect.verify(stored)]
        checked = "sizes only: format 1 has no checksums" if stored.index.version == 1 else "all checksums agree"
        lines += report["problems"] or [f"verified: {checked}"]
        code = EXIT_VERDICT_NO if report["problems"] else code
    if args.diff:
        report["diff"] = inspect.compare(stored, inspect.open_for_inspection(args.diff).stored)
        lines += ["", inspect.describe_comparison(report["diff"])]
        code = code if report["diff"]["same"] else EXIT_VERDICT_NO
    print(json.dumps(report) if args.json else "\n".join(lines))
    return code
