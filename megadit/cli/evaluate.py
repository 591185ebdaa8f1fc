"""Scores of sampled pictures.

python launch/sample.py runs/emoji-mmdit --prompts texts.txt --npz pictures.npz
python tools/evaluate.py emoji-clip pictures.npz --prompts texts.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megadit.cli import add_plugins, import_plugins
from megadit.errors import EXIT_OK
from megadit.extensions import METRICS


def parser() -> argparse.ArgumentParser:
    """The command line; the scores of plugins are there once these are imported."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plugins(p)
    scores = p.add_subparsers(dest="score", required=True, metavar="SCORE")
    for name in METRICS.names():
        metric = METRICS.get(name)()
        one = scores.add_parser(name, help=metric.help)
        metric.add_arguments(one)
        add_plugins(one)
        one.add_argument("--json", action="store_true", help=f"print one JSON object: {metric.keys}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Read, score, print."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugins(first)
    first.add_argument("score", nargs="?")
    known, _ = first.parse_known_args(words)
    import_plugins(known)
    if known.score is not None:
        METRICS.get(known.score)  # refuses in a sentence what is none
    args = parser().parse_args(words)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/evaluate.py")
    metric = METRICS.get(args.score)()
    result = metric.compute(args)
    print(json.dumps(result) if args.json else metric.describe(result))
    return EXIT_OK
