#!/usr/bin/env python
"""The update of one flat ZeRO shard under bf16 on a GPU: megadit's fused kernel, and DeepSpeed's passes around torch's.

fused   one launch (``optim.implementation: fused``)
torch   what DeepSpeed 0.19 does at ZeRO 1 with torch's fused AdamW: join the gradients, convert them to float32,
        multiply by the clip coefficient, update, copy the masters to the weights
update  torch's AdamW alone, its gradients in float32 already

Each arm is timed with the device idle before and after; they take turns and medians are compared. GB/s of ``fused``
are 28 bytes per parameter over its time, beside those of a copy of a large tensor.

python benchmarks/adamw.py [--parameters 500000000 --pieces 200]
python benchmarks/adamw.py --dry_run        # the same lines on the CPU, through Triton's interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

_BYTES = 28  # per parameter: bf16 gradient and weight, float32 master and moments read and written


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parameters", type=int, default=500_000_000, help="of the shard (default: %(default)s)")
    p.add_argument("--pieces", type=int, default=200, help="gradients that it is made of (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="counted rounds (default: %(default)s)")
    p.add_argument("--dry_run", action="store_true", help="a small shard on the CPU; its times mean nothing")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def arms_of(count: int, pieces: int, device: str) -> dict[str, Callable[[], Any]]:
    """The functions to time; each leaves the device idle."""
    import torch

    from megadit_kernels.adamw import FusedAdamW

    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs, alone = (torch.randn(count, device=device).requires_grad_() for _ in range(3))
    weights = torch.zeros(count, device=device, dtype=torch.bfloat16)
    gradients = [piece.clone() for piece in torch.randn(count, device=device).bfloat16().chunk(pieces)]
    factor, idle = torch.tensor(0.5, device=device), torch.zeros((), device=device)
    fused = FusedAdamW([ours], **options)
    around, plain = (torch.optim.AdamW([master], fused=True, **options) for master in (theirs, alone))
    fused.found_inf = around.found_inf = plain.found_inf = idle  # type: ignore[attr-defined]
    alone.grad = torch.randn_like(alone)

    def by_kernel() -> None:
        fused.prepare(ours, gradients=gradients, scale=factor, copy=weights)
        fused.step()

    def by_deepspeed() -> None:
        theirs.grad = torch.cat(gradients).to(torch.float32).mul_(factor)
        around.step()
        weights.copy_(theirs.detach())

    copied = torch.empty_like(alone)
    functions = {
        "fused": by_kernel,
        "torch": by_deepspeed,
        "update": plain.step,
        "copy": lambda: copied.copy_(ours.data),
    }

    def timed(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return {name: timed(function) for name, function in functions.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from megadit.errors import UserError

    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.arms import median_seconds
    from megadit_kernels.backends import backend

    if not args.dry_run and not backend("triton").works:
        raise UserError(
            f"the kernel needs a GPU and Triton ({backend('triton').detail}); give --dry_run to try it here"
        )
    torch.manual_seed(0)
    count, pieces = (5000, 3) if args.dry_run else (args.parameters, args.pieces)
    arms = arms_of(count, pieces, "cpu" if args.dry_run else "cuda")
    seconds = median_seconds(arms, warmup=1 if args.dry_run else 5, rounds=1 if args.dry_run else args.rounds)
    result = {
        "device": "cpu, interpreted: no measurement" if args.dry_run else torch.cuda.get_device_name(),
        "parameters": count,
        "ms": {name: 1000 * value for name, value in seconds.items()},
        "fused_gb_s": _BYTES * count / seconds["fused"] / 1e9,
        "copy_gb_s": 8 * count / seconds["copy"] / 1e9,
        "torch_over_fused": seconds["torch"] / seconds["fused"],
        "update_over_fused": seconds["update"] / seconds["fused"],
    }
    if args.json:
        print(json.dumps(result))
        return 0
    times = ", ".join(f"{name} {1000 * value:.3f} ms" for name, value in seconds.items())
    print(f"{result['device']}; {count:,} parameters in {pieces} gradients: {times}")
    print(
        f"fused {result['fused_gb_s']:.0f} GB/s of {result['copy_gb_s']:.0f} that a copy reaches; "
        f"DeepSpeed's passes and torch's AdamW take {result['torch_over_fused']:.2f} times as long"
    )
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
