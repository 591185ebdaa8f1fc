#!/usr/bin/env python
"""What starting a command costs, in seconds of CPU: --help, refusals, reports and the smallest run.

Medians of several processes each, user and system time of all their threads and children, after one run that fills the
caches. Exit code 3 if a --help is over the limit. --tree names another checkout to measure, such as one of before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXIT_VERDICT_NO = 3
DIGITS = "configs/quickstart/digits.yaml"

# What is measured: its name, the command and the exit code it must end with. RUN is a finished run of digits, NEW a
# folder that does not exist.
CASES = (
    ("refused: unknown key", ("launch/pretrain.py", "nosuch.key=1"), 2),
    ("refused: no such file", ("launch/pretrain.py", "--config", "NEW.yaml"), 2),
    ("refused: no such data", ("launch/pretrain.py", "data.name=image-folder", "data.path=NEW"), 2),
    ("refused: layout", ("launch/pretrain.py", "parallel.tensor=2"), 2),
    ("refused: a sweep's key", ("launch/sweep.py", "run", "--config", "dit-width-mini", "nosuch=1"), 2),
    ("refused: no such checkpoint", ("tools/inspect_checkpoint.py", "NEW"), 2),
    ("refused: conversion", ("tools/convert_checkpoint.py", "--from", "diffusers", "--to", "megadit", "NEW", "x"), 2),
    ("pretrain --dry_run, digits", ("launch/pretrain.py", "--config", DIGITS, "--dry_run", "--run_dir", "NEW"), 0),
    ("pretrain, a step of digits", ("launch/pretrain.py", "--config", DIGITS, "train.steps=1", "--run_dir", "NEW"), 0),
    ("mup_table, digits", ("tools/mup_table.py", "--config", DIGITS), 0),
    ("coord_check, 5 steps of digits", ("tools/coord_check.py", "--config", DIGITS, "--steps", "5", "--seeds", "1",
                                        "--widths", "32,64,96", "--out", "NEW"), None),
    ("sample, one picture", ("launch/sample.py", "RUN", "--count", "1", "--steps", "2", "--out", "NEW.png"), 0),
    ("inspect_checkpoint", ("tools/inspect_checkpoint.py", "RUN"), 0),
)  # fmt: skip


def cpu_seconds(command: Sequence[str], tree: Path, code: int | None) -> float:
    """User and system time of one run of ``command`` in s. Raises RuntimeError if it ends with another code."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code is not None and done.returncode != code:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(tree: Path, runs: int, folder: Path) -> dict[str, float]:
    """Median CPU seconds by case; --help is the slowest of all commands'."""
    scripts = sorted(path.relative_to(tree) for part in ("launch", "tools") for path in (tree / part).glob("*.py"))
    helps = {script: statistics.median(_times((str(script), "--help"), tree, runs, 0)) for script in scripts}
    slowest = max(helps, key=lambda script: helps[script])
    medians = {"--help (slowest of all commands)": helps[slowest]}
    run = folder / "run"
    cpu_seconds(("launch/pretrain.py", "--config", DIGITS, "train.steps=2", "--run_dir", str(run)), tree, 0)
    for name, words, code in CASES:
        times = []
        for number in range(runs + 1):
            new = str(folder / f"{len(medians)}-{number}")
            command = [word.replace("NEW", new).replace("RUN", str(run)) for word in words]
            times.append(cpu_seconds(command, tree, code))
        medians[name] = statistics.median(times[1:])
        print(f"{medians[name]:7.2f} s  {name}", file=sys.stderr)
    return medians


def _times(command: Sequence[str], tree: Path, runs: int, code: int) -> list[float]:
    return [cpu_seconds(command, tree, code) for _ in range(runs + 1)][1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case and compare --help with the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="measured processes of each case (default 3)")
    parser.add_argument("--limit", type=float, default=0.5, metavar="S", help="CPU seconds too long for --help")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="DIR", help="checkout to measure; default: this one")
    parser.add_argument("--json", action="store_true", help="one JSON object: limit_s, cpu_s by case, ok")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args.tree.resolve(), args.runs, Path(folder))
    ok = next(iter(seconds.values())) <= args.limit
    if args.json:
        print(json.dumps({"limit_s": args.limit, "cpu_s": seconds, "ok": ok}))
    else:
        print("\n".join(f"{value:7.2f} s  {name}" for name, value in seconds.items()))
        print(f"CPU seconds, median of {args.runs}; limit of --help {args.limit:g} s: {'ok' if ok else 'no'}")
    return 0 if ok else EXIT_VERDICT_NO


if __name__ == "__main__":
    sys.exit(main())
