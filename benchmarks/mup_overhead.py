#!/usr/bin/env python
"""What muP costs a step: DiT-XL/2 under muP against the same shapes under SP, forward, backward and optimizer.

muP multiplies the readout and gives the optimizer more groups; everything else is the same work. Both models lie in
memory, take turns and hold their groups in torch's fused AdamW, bfloat16. The aim is a ratio of at most 1.005.

python benchmarks/mup_overhead.py [--images 128 --out FILE]
python benchmarks/mup_overhead.py --dry_run        # the same lines on the CPU at a tiny size
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]


def parser() -> argparse.ArgumentParser:
    from benchmarks.gpu_timing import common_parser

    p = common_parser(__doc__, seconds=60)
    p.add_argument("--images", type=int, default=128, help="images of a step (default: %(default)s)")
    return p


def step_of(config_file: str, images: int, device: str, dry_run: bool) -> tuple[Callable[[], None], int, int]:
    """One step of the file's model, its number of optimizer groups and of parameters."""
    import torch

    from benchmarks.blocks import built, forward_backward, inputs_of
    from megadit.config import ModelConfig, load_config
    from megadit.mup.groups import param_groups

    run = load_config(config_file)
    config = run.model
    if dry_run:
        tiny = {"width": 64, "heads": None, "head_dim": 16, "depth": 2, "input_size": 8, "num_classes": 10}
        config = ModelConfig(**config.model_dump(exclude_unset=True) | tiny)
    model = built(config, device, torch.bfloat16)
    groups = param_groups(model, run.optim)
    optimizer = torch.optim.AdamW(
        [{key: group[key] for key in ("params", "lr", "weight_decay", "eps")} for group in groups], fused=True
    )
    work = forward_backward(
        functools.partial(model, *inputs_of(config, images, device, torch.bfloat16)), list(model.parameters())
    )

    def step() -> None:
        work()
        optimizer.step()

    return step, len(groups), sum(parameter.numel() for parameter in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from benchmarks.gpu_timing import Arm, finish, start

    watch, deadline = start(args)
    images = 2 if args.dry_run else args.images
    files = {"muP": "dit/xl-2-mup.yaml", "SP": "dit/xl-2.yaml"}
    steps = {name: step_of(file, images, watch.device, args.dry_run) for name, file in files.items()}
    times = watch.medians({name: Arm(step) for name, (step, *_) in steps.items()})
    result = {
        "images": images,
        "parameters": {name: count for name, (_, _, count) in steps.items()},
        "groups": {name: groups for name, (_, groups, _) in steps.items()},
        "ms": times,
        "mup_over_sp": times["muP"] / times["SP"],
    }
    document = finish(args, "mup_overhead", result, deadline)
    for name, ms in times.items():
        print(f"{name:4s} {ms:8.2f} ms, {result['groups'][name]} optimizer groups")
    print(f"muP / SP {result['mup_over_sp']:.4f}   (aim at most 1.005)")
    if document["note"]:
        print(document["note"])
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
