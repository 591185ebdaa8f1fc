"""Scores of sampled pictures.

python launch/sample.py runs/emoji-mmdit --prompts texts.txt --npz pictures.npz
python tools/evaluate.py emoji-clip pictures.npz --prompts texts.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megadit.errors import EXIT_OK, UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scores = p.add_subparsers(dest="score", required=True, metavar="SCORE")
    emoji = scores.add_parser(
        "emoji-clip", help="how well pictures of emoji go with their texts (two small heads; not a CLIP score)"
    )
    emoji.add_argument("pictures", type=Path, metavar="FILE.npz", help="what launch/sample.py --npz wrote")
    emoji.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="the texts, one a line, in turn")
    emoji.add_argument("--json", action="store_true", help="print one JSON object: matched, shuffled, margin, …")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Read, score, print."""
    args = parser().parse_args(argv)
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/evaluate.py")
    from megadit.diffusion.prompt_files import read_prompts

    texts = read_prompts(args.prompts)
    if not args.pictures.is_file():
        raise UserError(f"{args.pictures}: there is no such file; give what launch/sample.py --npz wrote")
    from megadit.evaluate.metrics.emoji_clip import load_emoji_clip, read_pictures

    pictures = read_pictures(args.pictures)
    score = load_emoji_clip(pictures.shape[-1]).score(pictures, texts)
    if args.json:
        print(json.dumps(dataclasses.asdict(score)))
        return EXIT_OK
    print(f"emoji-clip score of {score.pictures} pictures of {score.texts} texts")
    print(f"  own text {score.matched:.3f}   other texts {score.shuffled:.3f}")
    print(f"  margin {score.margin:.3f} ± {score.margin_error:.3f}")
    print(f"  own text is the nearest: {score.retrieval:.2f} (by chance {score.chance:.2f})")
    return EXIT_OK
