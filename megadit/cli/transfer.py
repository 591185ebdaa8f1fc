"""Does what a proxy found transfer, and what is the target's configuration then?

verify  judges studies (directories or names), or a table: parabola and optimum per scale, drift, regret, verdict
apply   writes the target's configuration with the base hyperparameters that a study found

python tools/transfer.py verify runs/sweeps/dit-width-mini
python tools/transfer.py verify --table results.csv --scale width --hp log2_lr --score fid50k
python tools/transfer.py apply runs/sweeps/dit-width-mini --target configs/dit/xl-2-mup.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_VERDICT_NO, UserError, say
from megadit.streams import result_is_saved

if TYPE_CHECKING:
    from megadit.transfer.verdict import Limits, TransferVerdict

EXITS = {"transfers": EXIT_OK, "does not transfer": EXIT_VERDICT_NO, "inconclusive": EXIT_FAILURE}

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
    add_plugins(p)
    p.add_argument("--json", action="store_true", help="one JSON object on stdout: verdict, best, drift, regret, …")


def _apply(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", metavar="STUDY", help="study directory or name")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a key of the target")
    p.add_argument("--target", required=True, metavar="CONFIG", help="the target's run configuration (muP)")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: target.yaml in the study's directory")
    p.add_argument("--verified-by", nargs="+", action="extend", metavar="STUDY", help="studies that verified transfer")
    p.add_argument("--force", action="store_true", help='write although the verdict is not "transfers"')
    p.add_argument("--manual-multiple", type=float, metavar="X", help="cost of tuning by hand, in target trainings")
    add_plugins(p)
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the subcommand says."""
    p = parser()
    args, rest = p.parse_known_args(argv)  # argparse leaves key.sub=value behind options to us
    if rest and (args.action != "apply" or any(word.startswith("-") for word in rest)):
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks(f"tools/transfer.py {args.action}")
    import_plugins(args)
    if args.action == "verify":
        return verify(args)
    args.overrides += rest
    return apply(args)


def verify(args: argparse.Namespace) -> int:
    """Judge what the command line names, print it, and return the exit code. Raises UserError for bad input."""
    from megadit.files.paths import PNG, check_output
    from megadit.transfer.text import format_verdict
    from megadit.transfer.verdict import worst

    if args.plot is not None:
        if len(args.studies) > 1:
            raise UserError(f"--plot: {len(args.studies)} studies do not fit one picture; verify them one at a time")
        check_output(args.plot, "--plot", "PNG picture", PNG)
    limits = _limits(args)
    if args.table is not None:
        verdicts = [_of_table(args, limits)]
    elif args.studies:
        verdicts = _of_studies(args, limits)
    else:
        raise UserError("verify: nothing to judge; name a study, or --table FILE.csv with --scale, --hp and --score")
    answer = worst(verdicts)
    if args.plot is not None:
        from megadit.transfer.plot import plot_verdict

        try:
            plot_verdict(verdicts[0], args.plot)
        except OSError as error:
            raise UserError(f"--plot {args.plot}: cannot be written ({error.strerror}); choose another file") from error
    if args.json:
        # One verdict's object as it is; of several, the worst one's, with all of them under ``studies``.
        plain = next(verdict for verdict in verdicts if verdict.verdict == answer).to_json()
        every: dict[str, Any] = {"studies": [verdict.to_json() for verdict in verdicts]} if len(verdicts) > 1 else {}
        print(json.dumps(plain | every, allow_nan=False))
    else:
        print("\n\n".join(format_verdict(verdict) for verdict in verdicts))
        if len(verdicts) > 1:
            print(f"\nall together: {answer}")
    if args.plot is not None:
        say(f"picture: {args.plot}")
    return EXITS[answer]


def _limits(args: argparse.Namespace) -> Limits:
    from megadit.transfer.verdict import Limits

    given = {}
    for option, *_ in LIMITS:
        name = option.removeprefix("--").replace("-", "_")
        given[name] = getattr(args, name)
        if not given[name] >= 0:
            raise UserError(f"{option}: {given[name]:g} is not a number of 0 or more; correct it")
    return Limits(**given)


def _of_table(args: argparse.Namespace, limits: Limits) -> TransferVerdict:
    from megadit.transfer.score_table import Columns, lower_is_better, verify_table

    if args.studies:
        raise UserError(f"--table: is given beside the study {args.studies[0]}; verify one or the other")
    missing = [option for option in ("scale", "hp", "score") if getattr(args, option) is None]
    if missing:
        raise UserError(f"--{missing[0]}: is missing; a table needs --scale, --hp and --score COLUMN")
    if args.variant is not None:
        raise UserError("--variant: a table has none; leave it out")
    known = lower_is_better(args.score)
    lower = args.lower_is_better or (known is True and not args.higher_is_better)
    if known is None and not (args.lower_is_better or args.higher_is_better):
        print(
            f"warning: taking a higher {args.score} as better; say --lower-is-better or --higher-is-better",
            file=sys.stderr,
        )
    columns = Columns(args.scale, args.hp, args.score, args.seed)
    return verify_table(args.table, columns, lower=lower, proxy=args.proxy, limits=limits)


def _of_studies(args: argparse.Namespace, limits: Limits) -> list[TransferVerdict]:
    for option in ("scale", "seed", "lower_is_better", "higher_is_better"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise UserError(f"--{name}: is for --table; a study says it itself, so leave it out")
    from megadit.search.storage.store import load_results
    from megadit.search.verify_study import verify_study

    return [
        verify_study(load_results(source), args.score, args.variant, hp=args.hp, proxy=args.proxy, limits=limits)
        for source in args.studies
    ]


def apply(args: argparse.Namespace) -> int:
    """Apply what the command line says; 3 when a verdict is not "transfers". Raises UserError for bad input."""
    from megadit.config import load
    from megadit.config.loading.sources import find_config
    from megadit.search.apply import target
    from megadit.search.apply.summary import describe, to_json
    from megadit.search.storage.store import load_results

    verified_by, overrides = list(args.verified_by or ()), list(args.overrides)
    for word in [word for word in verified_by if "=" in word and not Path(word).exists()]:
        verified_by.remove(word)  # --verified-by STUDY … takes every word up to the next option
        overrides.append(word)
    results, others = load_results(args.study), [load_results(other) for other in verified_by]
    base = find_config(args.target, "--target")
    options: dict[str, Any] = {"force": args.force, "manual_multiple": args.manual_multiple, "overrides": overrides}
    try:
        applied = target.apply(results, others, load(base, overrides), base, args.out, **options)
    except target.NotVerifiedError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        if args.json:
            verdicts = [each.to_json() for each in refusal.study_verdicts]
            print(json.dumps({"written": None, "refused": str(refusal), "verdicts": verdicts}, allow_nan=False))
        return EXIT_VERDICT_NO
    if applied.not_verified:
        print(
            f"warning: NOT verified: no study given judged the transfer of {', '.join(applied.not_verified)}; name one "
            "that did by --verified-by",
            file=sys.stderr,
        )
    result_is_saved(as_json=args.json)
    print(json.dumps(to_json(applied), allow_nan=False) if args.json else describe(applied))
    return EXIT_OK
