#!/usr/bin/env python
"""Step time of megadit's real loop against a bare torch loop and against diffusers, as ratios from one run.

Three arms take turns, one optimizer step each, so that a drifting machine slows all alike; the medians are
compared:

  megadit    batches from the built-in data, keyed noise, objective, DeepSpeed engine, muP optimizer, metrics
  bare       the same model and groups under torch.optim.AdamW(fused), torch.randn noise, mean squared error
  diffusers  DiTTransformer2DModel of the same sizes in the same bare loop

python benchmarks/step_time.py [--width 256 --depth 6 --batch 32 --steps 15]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--steps", type=int, default=15, help="counted steps of each arm")
    p.add_argument("--warmup", type=int, default=3, help="steps of each arm that are not counted")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def megadit_arm(overrides: list[str], folder: str) -> tuple[Callable[[], Any], Any]:
    """One step of the real loop, and the model config that it uses."""
    from benchmarks.arms import assemble_run
    from megadit.data import BatchStream
    from megadit.train.metrics import Meter

    run, config = assemble_run(overrides, folder)
    meter = Meter(run)
    batches = iter(BatchStream(run.train_set, run.layout, 0, flip=False, workers=0))
    return lambda: meter.add(run.engine.train_batch(0, meter.timed(batches), False).losses), config


def bare_arm(model: Any, groups: Any, config: Any, forward: Callable[[Any, Any, Any], Any]) -> Callable[[], Any]:
    """One step of the shortest torch loop over ``model``: flow matching on random pictures."""
    import torch

    m, batch = config.model, config.train.global_batch
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step() -> None:
        x0 = torch.rand(batch, m.in_channels, m.input_size, m.input_size) * 2 - 1
        labels = torch.randint(m.num_classes, (batch,))
        t, noise = torch.rand(batch), torch.randn_like(x0)
        mixed = torch.lerp(x0, noise, t[:, None, None, None])
        loss = (forward(mixed, 1000 * t, labels) - (noise - x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def diffusers_model(m: Any) -> Any:
    """DiTTransformer2DModel with the sizes of a megadit model config."""
    from megadit.optional import import_diffusers

    import_diffusers()
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=m.num_heads,
        attention_head_dim=m.head_channels,
        in_channels=m.in_channels,
        out_channels=m.out_channels,
        num_layers=m.depth,
        sample_size=m.input_size,
        patch_size=m.patch_size,
        num_embeds_ada_norm=m.num_classes,
        norm_eps=1e-6,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    import torch

    from benchmarks.arms import median_seconds
    from megadit.conditioning import Conditioning
    from megadit.models import build_model
    from megadit.mup.groups import param_groups

    overrides = [
        f"model.width={args.width}",
        f"model.depth={args.depth}",
        f"train.global_batch={args.batch}",
        "train.precision=fp32",
        "train.micro_batch=null",
        "optim.clip.value=null",
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, config = megadit_arm(overrides, folder)
        model, other = build_model(config.model), diffusers_model(config.model)
        arms = {
            "megadit": ours,
            "bare": bare_arm(
                model,
                param_groups(model, config.optim),
                config,
                lambda x, t, y: model(x, t, Conditioning(labels=y)),
            ),
            "diffusers": bare_arm(
                other, other.parameters(), config, lambda x, t, y: other(x, timestep=t, class_labels=y).sample
            ),
        }
        medians = median_seconds(arms, args.warmup, args.steps)
    result = {
        "step_ms": {name: round(1000 * value, 1) for name, value in medians.items()},
        "megadit_over_bare": round(medians["megadit"] / medians["bare"], 3),
        "megadit_over_diffusers": round(medians["megadit"] / medians["diffusers"], 3),
        "threads": torch.get_num_threads(),
        "steps": args.steps,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"median of {args.steps} interleaved steps on {result['threads']} thread(s): "
        f"width {args.width}, depth {args.depth}, batch {args.batch}"
    )
    for name, value in medians.items():
        print(f"  {name:10s} {1000 * value:8.1f} ms")
    print(f"megadit / bare      {result['megadit_over_bare']}   (aim ≤ 1.05, at least ≤ 1.10)")
    print(f"megadit / diffusers {result['megadit_over_diffusers']}   (aim ≤ 1.0)")
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
