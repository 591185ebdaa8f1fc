"""How good pictures are: scores of sampled pictures, a file each. Importing this needs no torch."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

# Classes of metrics by name, each a SCORE of tools/evaluate.py. See megadit/extensions.py.
METRICS = {"emoji-clip": "megadit.evaluate.metrics.emoji_clip:EmojiClipMetric"}


class Metric(ABC):
    """One SCORE of ``tools/evaluate.py``: its arguments, its computation, how the result is told.

    ``--help`` asks for all of it but ``compute``, where what is heavy is imported.
    """

    help: str = ""  # one line
    keys: str = "its numbers"  # what --json prints, for --help

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027  (a metric may need none)
        """Add what the command line is to say. ``--json`` and ``--plugins`` are there already."""

    @abstractmethod
    def compute(self, args: argparse.Namespace) -> dict[str, Any]:
        """The result, as ``--json`` prints it.

        Raises:
            UserError: the arguments name what cannot be scored.
        """

    def describe(self, result: Mapping[str, Any]) -> str:
        """The result for people, by default one line for each key."""
        return "\n".join(f"{key} {value}" for key, value in result.items())
