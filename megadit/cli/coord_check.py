"""Coordinate check: train the config's model at several widths for a few steps and compare the sizes of everything.

Under a correct muP nothing grows or dies with width. Writes coord_check.png, coords.csv and verdict.json to --out;
exit code 0 if all modules pass, 3 if one is broken (named), 1 if training reached none, 2 for bad input. A module that
training does not reach within the steps is named, and neither right nor wrong. Everything is computed in float64. With
--tp N the same is read from N processes that share every layer: started here, or by torchrun.

python tools/coord_check.py --config configs/dit/xl-2-mup.yaml --widths 144,288,576 --out cc model.depth=2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_VERDICT_NO, UserError, say
from megadit.files.paths import check_folder
from megadit.streams import result_is_saved

# At a rate that turns everything over in a few steps, slopes tell of the rate: the narrow models, whose updates are the
# largest, bend them at correct rules. Small steps are linear in the rate, and a wrong rule bends these too.
_LINEAR = 2.0**-10


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a config key, e.g. model.depth=2")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML); default: the quickstart")
    add_plugins(p)
    p.add_argument("--widths", default="64,128,256", metavar="A,B,…", help="at least three; default 64,128,256")
    p.add_argument("--steps", type=int, default=6, metavar="N", help="optimizer steps, at least 5; default 6")
    p.add_argument("--seeds", type=int, default=2, metavar="N", help="initialisations per width; default 2")
    p.add_argument("--batch", type=int, default=16, metavar="N", help="images per step; default 16")
    p.add_argument("--lr", metavar="RATE", help="base learning rate, e.g. 2^-7; default: the config's, at most 2^-10")
    p.add_argument("--param", choices=("sp", "mup"), help="default: the config's parametrization")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks; default 1")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write the report")
    p.add_argument("--json", action="store_true", help="print verdict.json's object instead of the table")
    return p


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--widths {text}: not whole numbers with commas between; write e.g. 64,128,256") from None


def _rate(text: str | None, default: float) -> float:
    from megadit.config.schema.values import parse_number

    rate = default if text is None else parse_number(text)
    if rate is None or not 0.0 < rate < float("inf"):
        raise UserError(f"--lr {text}: not a learning rate; give a number above 0, e.g. 1e-3 or 2^-10")
    return rate


def main(argv: Sequence[str] | None = None) -> int:
    """Check, write the report, print it."""
    args = parser().parse_intermixed_args(argv)
    widths = _widths(args.widths)
    if args.tp < 1:
        raise UserError(f"--tp {args.tp}: not a number of ranks; give 1 or more")
    from megadit.parallel.launcher import check_rank_count

    ranks = check_rank_count(args.tp, "--tp")
    import_plugins(args)
    from megadit.config import load_config
    from megadit.mup.coord_check.plan import CoordPlan, check_report_folder, check_shares

    # A base width that is given with --param mup is read, whatever the config's own parametrization.
    of_mup = args.param == "mup" and any(text.strip().startswith("model.base_width=") for text in args.overrides)
    config = load_config(args.config, [*args.overrides, *(["model.parametrization=mup"] if of_mup else [])])
    weight = config.objective.repa_weight
    rate = _rate(args.lr, min(config.optim.lr, _LINEAR))
    plan = CoordPlan(widths, args.steps, args.seeds, args.batch)
    check_shares(config.model, plan, args.tp)
    check_folder(args.out, "--out")
    check_report_folder(args.out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made ({error.strerror}); choose another folder") from error
    import torch.distributed as dist

    from megadit.diffusion import build_objective
    from megadit.diffusion.objectives.repa import alignment_loss
    from megadit.models import build_model
    from megadit.mup.coord_check.measure import measure_coordinates
    from megadit.mup.coord_check.report import format_verdict, write_report
    from megadit.mup.coord_check.verdict import judge
    from megadit.mup.example import example_conditioning
    from megadit.optional import defer_compiler
    from megadit.parallel import start_processes, stop_processes
    from megadit.parallel.launcher import run_local_ranks
    from megadit.parallel.tensor import UNSHARDED, TensorLayout

    if args.tp > 1 and ranks == 1:
        return run_local_ranks(args.tp, ["-m", "megadit", "coord_check", *(sys.argv[1:] if argv is None else argv)])
    # This process's place among those that share every layer.
    layout = UNSHARDED if args.tp == 1 else TensorLayout(args.tp, start_processes().rank, group=dist.group.WORLD)
    defer_compiler()
    parametrization = args.param or config.model.parametrization
    measurements = measure_coordinates(
        config.model,
        config.optim.model_copy(update={"lr": rate}),
        plan,
        build=lambda model, seed: build_model(model, layout, seed),
        objective=build_objective(
            config.objective, learn_sigma=config.model.learn_sigma, null=example_conditioning(config.model, [0])
        ),
        parametrization=parametrization,
        alignment=None if config.model.repa is None else lambda one, other: weight * alignment_loss(one, other),
        progress=lambda line: None if layout.rank else print(line, file=sys.stderr),
    )
    verdict = judge(measurements)
    code = {"passes": EXIT_OK, "broken": EXIT_VERDICT_NO, "not judged": EXIT_FAILURE}[verdict.outcome]
    if layout.size > 1:
        stop_processes()
    if layout.rank:
        return code
    title = f"{config.model.family} under {'muP' if parametrization == 'mup' else 'SP'}"
    plain = write_report(args.out, measurements, verdict, title)
    result_is_saved(as_json=args.json)
    print(json.dumps(plain) if args.json else format_verdict(verdict))
    say(f"written to {args.out}: coords.csv, verdict.json, coord_check.png")
    return code
