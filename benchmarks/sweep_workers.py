#!/usr/bin/env python
"""What a study costs beyond training, and what a second worker brings, from one run.

A small study of equal trials is run by one worker and by two, in turn, each bound to a core of its own. Told are the
overhead of a trial (all but its training steps: claim, model, engine, scores, result) after its worker's first, and
the throughput of two workers over that of one, from the same trials.

python benchmarks/sweep_workers.py [--trials 12 --steps 120 --rounds 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels")]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trials", type=int, default=12, help="of each study")
    p.add_argument("--steps", type=int, default=120, help="of each trial")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2, help="how often one worker and two take turns")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def run_study(folder: Path, args: argparse.Namespace, workers: int) -> tuple[list[Any], float]:
    """The trials of one study, and the seconds of its whole command."""
    from megadit.search.storage.store import load_results

    study = {
        "base": "quickstart/digits.yaml",
        "overrides": {"model.width": args.width, "train.steps": args.steps, "train.log_every": args.steps},
        "space": {"optim.lr": {"grid": [2.0**-8]}},
        "sampler": "grid",
        "seeds": list(range(args.trials)),
        "scores": [{"name": "loss", "kind": "train_loss", "last": args.steps}],
    }
    folder.mkdir()
    file = folder / "study.json"  # JSON is YAML
    file.write_text(json.dumps(study), encoding="utf-8")
    words = ["run", "--config", str(file), "--study_dir", str(folder / "out"), "--workers", str(workers)]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "sweep.py"), *words], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode != 0:
        raise SystemExit(f"the study ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return list(load_results(folder / "out").trials), time.monotonic() - begin


def later(trials: list[Any], workers: int) -> list[Any]:
    """The trials without each worker's first, which pays for imports and data: those of the longest overhead."""
    return sorted(trials, key=lambda trial: trial.overhead_s)[: len(trials) - workers]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    whole: dict[int, list[float]] = {1: [], 2: []}
    overhead: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                trials, took = run_study(Path(folder) / f"{turn}-{workers}", args, workers)
                counted = later(trials, workers)
                seconds[workers] += [trial.seconds for trial in counted]
                overhead += [trial.overhead_s for trial in counted]
                whole[workers].append(took)
    means = {workers: statistics.fmean(values) for workers, values in seconds.items()}
    result = {
        "overhead_s": {"median": round(statistics.median(overhead), 3), "largest": round(max(overhead), 3)},
        "trial_s": {str(workers): round(mean, 3) for workers, mean in means.items()},
        "two_workers_over_one": round(2 * means[1] / means[2], 3),
        "whole_command_ratio": round(sum(whole[1]) / sum(whole[2]), 3),
        "trials": len(overhead),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['trials']} trials of width {args.width} and {args.steps} steps, each worker's first not counted")
    print(
        f"overhead per trial  {result['overhead_s']['median']} s, at most {result['overhead_s']['largest']} (aim ≤ 2)"
    )
    print(f"a trial takes       {means[1]:.2f} s beside no other, {means[2]:.2f} s beside another")
    print(f"two workers / one   {result['two_workers_over_one']} in trials per second (aim ≥ 1.8)")
    print(f"whole commands      {result['whole_command_ratio']} with start-up and report")
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
