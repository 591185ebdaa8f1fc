"""``emoji-clip``: how well pictures of emoji go with their texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.evaluate.metrics import Metric


class EmojiClipMetric(Metric):
    """See ``clip_heads`` for what it measures."""

    help = "how well pictures of emoji go with their texts (two small heads; not a CLIP score)"
    keys = "matched, shuffled, margin, …"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The pictures and their texts."""
        parser.add_argument("pictures", type=Path, metavar="FILE.npz", help="what launch/sample.py --npz wrote")
        parser.add_argument(
            "--prompts", type=Path, required=True, metavar="FILE", help="the texts, one a line, in turn"
        )

    def compute(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of ``EmojiClipScore``."""
        from megadit.diffusion.sampling.prompts import read_prompts

        texts = read_prompts(args.prompts)
        if not args.pictures.is_file():
            raise UserError(f"{args.pictures}: there is no such file; give what launch/sample.py --npz wrote")
        from megadit.evaluate.metrics import clip_heads
        from megadit.evaluate.pictures import read_pictures

        pictures = read_pictures(args.pictures)
        return dataclasses.asdict(clip_heads.load_emoji_clip(pictures.shape[-1]).score(pictures, texts))

    def describe(self, result: Mapping[str, Any]) -> str:
        """Cosines, their margin and the retrieval rate, in four lines."""
        return (
            "emoji-clip score of {pictures} pictures of {texts} texts\n"
            "  own text {matched:.3f}   other texts {shuffled:.3f}\n"
            "  margin {margin:.3f} ± {margin_error:.3f}\n"
            "  own text is the nearest: {retrieval:.2f} (by chance {chance:.2f})"
        ).format(**result)
