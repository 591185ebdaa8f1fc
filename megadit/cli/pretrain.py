"""Pretrain a diffusion Transformer. The same line works after python, torchrun, deepspeed and srun.

python launch/pretrain.py                                    the quickstart
deepspeed launch/pretrain.py --ds_config ds.json --config configs/dit/xl-2-mup.yaml data.path=… data.vae.path=…
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from megadit.cli import add_plugins


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key, e.g. optim.lr=2e-4")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML); default: the quickstart")
    add_plugins(p)
    p.add_argument(
        "--ds_config", "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; default: made from --config"
    )
    p.add_argument("--run_dir", metavar="DIR", help="where to write; default runs/<config name>")
    p.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default auto: go on from the latest")
    p.add_argument(
        "--dry_run", action="store_true", help="check everything, print layout, memory and muP table, do not train"
    )
    p.add_argument("--world_size", type=int, metavar="N", help="--dry_run as if for N ranks, of other machines")
    p.add_argument("--full", action="store_true", help="--dry_run: the muP table with one row per parameter")
    p.add_argument("--json", action="store_true", help="--dry_run: print the layout as one JSON object")
    p.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # passed out of habit; has no effect
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from launchers
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then train (or report, with --dry_run)."""
    args = parser().parse_intermixed_args(argv)
    from megadit.train.preemption import PreemptedAtStart, exit_before_training, preemption_signals

    # A dry run has nothing to save, and a signal ends it as any command.
    with contextlib.nullcontext() if args.dry_run else preemption_signals("starting"):
        try:
            from megadit.plugins import plugin_names
            from megadit.train import entry

            return entry.run(
                args.config,
                args.overrides,
                args.ds_config,
                args.run_dir,
                args.resume,
                args.dry_run,
                world_size=args.world_size,
                as_json=args.json,
                full=args.full,
                plugins=plugin_names(args.plugins),
            )
        except PreemptedAtStart as preempted:
            from megadit.train.prepare import run_folder

            return exit_before_training(run_folder(args.config, args.run_dir), preempted)
