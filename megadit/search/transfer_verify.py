"""``tools/transfer.py verify``: which verdicts are asked for, what it prints, its exit codes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_VERDICT_NO, UserError, say
from megadit.files.paths import PNG, check_output
from megadit.search.storage.store import load_results
from megadit.search.verify_study import verify_study
from megadit.transfer.plot import plot_verdict
from megadit.transfer.table import Columns, lower_is_better, verify_table
from megadit.transfer.text import format_verdict
from megadit.transfer.verdict import Answer, Limits, Verdict, worst

EXITS: dict[Answer, int] = {"transfers": EXIT_OK, "does not transfer": EXIT_VERDICT_NO, "inconclusive": EXIT_FAILURE}


def run_verify(args: Namespace) -> int:
    """Judge what the command line names, print it, and return the exit code. Raises UserError for bad input."""
    if args.plot is not None and len(args.studies) > 1:
        raise UserError(f"--plot: {len(args.studies)} studies do not fit one picture; verify them one at a time")
    if args.plot is not None:
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
        _plot(args, verdicts[0])
    if args.json:
        print(json.dumps(_plain(verdicts, answer), allow_nan=False))
    else:
        print("\n\n".join(format_verdict(verdict) for verdict in verdicts))
        if len(verdicts) > 1:
            print(f"\nall together: {answer}")
    if args.plot is not None:
        say(f"picture: {args.plot}")
    return EXITS[answer]


def _limits(args: Namespace) -> Limits:
    given = {"max_drift": args.max_drift, "max_regret": args.max_regret}
    given |= {"allowance": args.allowance, "max_blur": args.max_blur}
    for name, value in given.items():
        if not value >= 0:
            raise UserError(f"--{name.replace('_', '-')}: {value:g} is not a number of 0 or more; correct it")
    return Limits(**given)


def _of_table(args: Namespace, limits: Limits) -> Verdict:
    if args.studies:
        raise UserError(f"--table: is given beside the study {args.studies[0]}; verify one or the other")
    missing = [option for option in ("scale", "hp", "score") if getattr(args, option) is None]
    if missing:
        raise UserError(f"--{missing[0]}: is missing; a table needs --scale, --hp and --score COLUMN")
    if args.variant is not None:
        raise UserError("--variant: a table has none; leave it out")
    lower: bool | None = True if args.lower_is_better else False if args.higher_is_better else None
    if lower is None:
        lower = lower_is_better(args.score)
    if lower is None:
        lower = False
        print(
            f"warning: taking a higher {args.score} as better; say --lower-is-better or --higher-is-better",
            file=sys.stderr,
        )
    columns = Columns(args.scale, args.hp, args.score, args.seed)
    return verify_table(args.table, columns, lower=lower, proxy=args.proxy, limits=limits)


def _of_studies(args: Namespace, limits: Limits) -> list[Verdict]:
    for option in ("scale", "seed", "lower_is_better", "higher_is_better"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise UserError(f"--{name}: is for --table; a study says it itself, so leave it out")
    return [
        verify_study(load_results(source), args.score, args.variant, hp=args.hp, proxy=args.proxy, limits=limits)
        for source in args.studies
    ]


def _plain(verdicts: Sequence[Verdict], answer: str) -> dict[str, Any]:
    """One verdict's object as it is; of several, the worst one's, with all of them under ``studies``."""
    if len(verdicts) == 1:
        return verdicts[0].to_json()
    deciding = next(verdict for verdict in verdicts if verdict.verdict == answer)
    return {**deciding.to_json(), "studies": [verdict.to_json() for verdict in verdicts]}


def _plot(args: Namespace, verdict: Verdict) -> None:
    try:
        plot_verdict(verdict, args.plot)
    except OSError as error:
        raise UserError(f"--plot {args.plot}: cannot be written ({error.strerror}); choose another file") from error
