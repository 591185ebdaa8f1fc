#!/usr/bin/env python
"""How long each command takes to answer --help: the median of several runs. Exit code 3 if one is over the limit."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXIT_VERDICT_NO = 3


def commands() -> list[Path]:
    """Every script of launch/ and tools/."""
    return sorted(path for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py"))


def median_seconds(script: Path, runs: int) -> float:
    """Median wall time of ``script --help`` in s, after one run that only fills the caches."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, str(script), "--help"], check=True, env=env, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Time every command and compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each command (default 5)")
    parser.add_argument("--limit", type=float, default=2.0, metavar="S", help="seconds that are too long (default 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object: limit_s, seconds by command, ok")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    seconds = {str(path.relative_to(ROOT)): median_seconds(path, args.runs) for path in commands()}
    slow = [name for name, value in seconds.items() if value > args.limit]
    if args.json:
        print(json.dumps({"limit_s": args.limit, "seconds": seconds, "ok": not slow}))
    else:
        width = max(map(len, seconds), default=0)
        for name, value in seconds.items():
            print(f"{name:<{width}}  {value:6.3f} s{'  too slow' if name in slow else ''}")
        print(f"median of {args.runs} runs each, limit {args.limit:g} s: {'no' if slow else 'ok'}")
    return EXIT_VERDICT_NO if slow else 0


if __name__ == "__main__":
    sys.exit(main())
