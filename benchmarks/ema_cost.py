#!/usr/bin/env python
"""What following the weights with a moving average costs, as shares of the optimizer step and of AdamW's own update.

One run of megadit's real loop; within every optimizer step the averages' update and AdamW's are timed, so that a
drifting machine slows all alike, and the medians are compared:

  step   batch, forward, backward, gradient reduction, AdamW and the averages: what a training step is
  adamw  the update of the inner optimizer alone
  ema    all averages together; the shares are told per average

python benchmarks/ema_cost.py [--width 256 --depth 6 --batch 32 --steps 15 --stage 0 --averages 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--stage", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage, one process")
    p.add_argument("--averages", type=int, default=1, metavar="N", help="averages that are kept")
    p.add_argument("--steps", type=int, default=15, help="counted steps")
    p.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def overrides(args: argparse.Namespace) -> list[str]:
    """The run, as keys of the configuration."""
    decays = ",".join(repr(1 - 10.0**-power) for power in range(2, 2 + args.averages))
    return [
        f"model.width={args.width}",
        f"model.depth={args.depth}",
        f"train.global_batch={args.batch}",
        "train.precision=fp32",
        "train.micro_batch=null",
        f"parallel.zero_stage={args.stage}",
        f"ema.decays=[{decays}]",
    ]


def timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """``call``, noting the seconds that it took until the device was done."""
    import torch

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def wrapped(*args: Any, **keywords: Any) -> Any:
        settle()
        begin = time.perf_counter()
        result = call(*args, **keywords)
        settle()
        times.append(time.perf_counter() - begin)
        return result

    return wrapped


def measure(run: Any, warmup: int, steps: int) -> dict[str, float]:
    """Median seconds per optimizer step of its parts."""
    from megadit.data import BatchStream
    from megadit.train.metrics import Meter

    times: dict[str, list[float]] = {"step": [], "adamw": [], "ema": []}
    inner = run.engine.optimizer.inner
    parts: list[float] = []
    inner.step = timed(inner.step, parts)
    run.engine.ema.update = timed(run.engine.ema.update, times["ema"])
    meter = Meter(run)
    batches = iter(BatchStream(run.train_set, run.layout, 0, flip=False, workers=0))
    step = timed(lambda: meter.add(run.engine.train_batch(0, meter.timed(batches), False).losses), times["step"])
    for _ in range(warmup + steps):
        parts.clear()  # under ZeRO the inner optimizer steps once per group
        step()
        times["adamw"].append(sum(parts))
    return {name: statistics.median(values[warmup:]) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    import torch

    from benchmarks.arms import assemble_run

    with tempfile.TemporaryDirectory() as folder:
        run, _ = assemble_run(overrides(args), folder)
        medians = measure(run, args.warmup, args.steps)
        fragments = run.engine.partitions.fragments()
        share = 4 * sum(f.stop - f.start for f in fragments)
        held = 4 * sum(values.numel() for f in fragments for values in run.engine.ema.tensors(f).values())
    result = {
        "ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ema_over_step": round(medians["ema"] / args.averages / medians["step"], 4),
        "ema_over_adamw": round(medians["ema"] / args.averages / medians["adamw"], 3),
        "masters_mb": round(share / 1e6, 1),
        "averages_mb": round(held / 1e6, 1),
        "threads": torch.get_num_threads(),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"median of {args.steps} steps on {result['threads']} thread(s): width {args.width}, depth {args.depth}, "
        f"batch {args.batch}, ZeRO {args.stage}, {args.averages} average(s)"
    )
    for name, value in medians.items():
        print(f"  {name:6s} {1000 * value:8.2f} ms")
    print(f"one average / step  {result['ema_over_step']}   (aim ≤ 0.10)")
    print(f"one average / adamw {result['ema_over_adamw']}")
    print(f"memory: masters {result['masters_mb']} MB, averages {result['averages_mb']} MB")
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
