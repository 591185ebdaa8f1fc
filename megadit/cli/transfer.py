"""Does what a proxy found transfer, and what is the target's configuration then?

verify  judges studies (directories or names), or a table: parabola and optimum per scale, drift, regret, verdict
apply   writes the target's configuration with the base hyperparameters that a study found

python tools/transfer.py verify runs/sweeps/dit-width-mini
python tools/transfer.py verify --table results.csv --scale width --hp log2_lr --score fid50k
python tools/transfer.py apply runs/sweeps/dit-width-mini --target configs/dit/xl-2-mup.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

VERIFY = """Judge whether the optimum of a hyperparameter stays where it is over width, batch or steps.

Exit code 0: transfers; 3: does not transfer; 1: inconclusive, the reasons say what to measure; 2: bad input.
Of several studies the least favourable verdict counts."""

LIMITS = (
    ("--max-drift", 0.25, "octaves of the optimum per octave of scale; half of what the mildest wrong rule makes"),
    ("--max-regret", 0.01, "what the proxy's optimum may cost, as a part of the best score"),
    ("--allowance", 2.5, "standard errors of a difference that count as noise"),
    ("--max-blur", 0.25, "how uncertain the optimum's way may be, as a part of the tried range"),
)

APPLY = """Write the target's configuration with a study's base hyperparameters, on the word of a verdict.

Exit code 0: written; 3: the verdict is not "transfers" and --force was not given; 2: bad input."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = p.add_subparsers(dest="action", required=True, metavar="verify|apply")
    _verify(commands.add_parser("verify", help="judge studies or a table", description=VERIFY, formatter_class=raw))
    _apply(commands.add_parser("apply", help="write the target's config", description=APPLY, formatter_class=raw))
    return p


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("studies", nargs="*", metavar="STUDY", help="study directories or names")
    p.add_argument("--score", metavar="NAME", help="judged score or column; default: the study's selection score")
    p.add_argument("--variant", metavar="NAME", help="judged variant; default: the study's first")
    p.add_argument("--hp", metavar="KEY", help="judged key or column; default: the study's first searched key")
    p.add_argument("--proxy", type=float, metavar="VALUE", help="scale whose optimum is carried over; default: the "
                   "study's; in a table the smallest that is no exception")  # fmt: skip
    p.add_argument(
        "--table", metavar="FILE.csv", help="judge a table instead of studies; a log2_* column has exponents"
    )
    p.add_argument("--scale", metavar="COLUMN", help="table: the column of the scale (width, batch, steps)")
    p.add_argument("--seed", metavar="COLUMN", help="table: the column of the seed; else equal rows count as seeds")
    direction = p.add_mutually_exclusive_group()
    direction.add_argument("--lower-is-better", action="store_true", help="table: default for losses, FID, …")
    direction.add_argument("--higher-is-better", action="store_true", help="table: default for all other scores")
    limits = p.add_argument_group("tolerances")
    for name, default, text in LIMITS:
        limits.add_argument(name, type=float, default=default, metavar="X", help=f"{text}; default {default:g}")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture (of one study or table)")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout: verdict, best, drift, regret, …")


def _apply(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", metavar="STUDY", help="study directory or name")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a key of the target")
    p.add_argument("--target", required=True, metavar="CONFIG", help="the target's run configuration (muP)")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: target.yaml in the study's directory")
    p.add_argument("--verified-by", nargs="+", action="extend", metavar="STUDY", help="studies that verified transfer")
    p.add_argument("--force", action="store_true", help='write although the verdict is not "transfers"')
    p.add_argument("--manual-multiple", type=float, metavar="X", help="cost of tuning by hand, in target trainings")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the subcommand says."""
    p = parser()
    args, rest = p.parse_known_args(argv)  # argparse leaves key.sub=value behind options to us
    if rest and (args.action != "apply" or any(word.startswith("-") for word in rest)):
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks(f"tools/transfer.py {args.action}")
    if args.action == "verify":
        from megadit.search.transfer_verify import run_verify

        return run_verify(args)
    from megadit.search.transfer_apply import run_apply

    args.overrides += rest
    return run_apply(args)
