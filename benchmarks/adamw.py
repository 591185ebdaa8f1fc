#!/usr/bin/env python
"""The update of one flat ZeRO shard under bf16 on a GPU: megadit's fused kernel, and DeepSpeed's passes around torch's.

fused   one launch (``optim.implementation: fused``)
torch   what DeepSpeed 0.19 does at ZeRO 1 with torch's fused AdamW: join the gradients, convert them to float32,
        multiply by the clip coefficient, update, copy the masters to the weights
update  torch's AdamW alone, its gradients in float32 already

The arms take turns; times are medians by CUDA events. GB/s of ``fused`` are 28 bytes per parameter over its time,
beside those of a copy of a large tensor.

python benchmarks/adamw.py [--parameters 500000000 --pieces 200 --out FILE]
python benchmarks/adamw.py --dry_run        # the same lines on the CPU, through Triton's interpreter
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

_BYTES = 28  # per parameter: bf16 gradient and weight, float32 master and moments read and written


def parser() -> argparse.ArgumentParser:
    from benchmarks.gpu_timing import common_parser

    p = common_parser(__doc__, seconds=30)
    p.add_argument("--parameters", type=int, default=500_000_000, help="of the shard (default: %(default)s)")
    p.add_argument("--pieces", type=int, default=200, help="gradients that it is made of (default: %(default)s)")
    return p


def arms_of(count: int, pieces: int, device: str) -> dict[str, Callable[[], Any]]:
    """The functions to time."""
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
    return {
        "fused": by_kernel,
        "torch": by_deepspeed,
        "update": plain.step,
        "copy": lambda: copied.copy_(ours.data),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from benchmarks.gpu_timing import Arm, finish, start

    watch, deadline = start(args)
    import torch

    from megadit_kernels.backends import backend

    count, pieces = (5000, 3) if args.dry_run else (args.parameters, args.pieces)
    result: dict[str, Any] = {"parameters": count, "gradients": pieces}
    if not args.dry_run and not backend("triton").works:
        deadline.skip("the fused update", f"a Triton that works here ({backend('triton').detail})")
    elif deadline.left("the update of a shard"):
        torch.manual_seed(0)
        ms = watch.medians({name: Arm(run) for name, run in arms_of(count, pieces, watch.device).items()})
        result |= {
            "ms": ms,
            "fused_gb_s": _BYTES * count / ms["fused"] / 1e6,
            "copy_gb_s": 8 * count / ms["copy"] / 1e6,
            "torch_over_fused": ms["torch"] / ms["fused"],
            "update_over_fused": ms["update"] / ms["fused"],
        }
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())
        print(f"{count:,} parameters in {pieces} gradients: {times}")
        print(
            f"fused {result['fused_gb_s']:.0f} GB/s of {result['copy_gb_s']:.0f} that a copy reaches; "
            f"DeepSpeed's passes and torch's AdamW take {result['torch_over_fused']:.2f} times as long"
        )
    document = finish(args, "adamw", result, deadline)
    if document["note"]:
        print(document["note"])
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
