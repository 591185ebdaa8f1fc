"""How good pictures are: scores of sampled pictures, a file each. Importing this needs no torch."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

# Classes of metrics by name, each a SCORE of tools/evaluate.py. See megadit/extensions.py.
METRICS = {"emoji-clip": "megadit.evaluate.metrics.emoji_clip:EmojiClipMetric"}


class Metric(ABC):
    """One SCORE of ``tools/evaluate.py``: its arguments, its computation, and the text of its result.

    ``--help`` calls all of it but ``compute``, which alone imports large packages.
    """

    help: str = ""  # one line
    keys: str = "its numbers"  # what --json prints, for --help

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027  (a metric may need none)
        """Add the arguments of the command line. ``--json`` and ``--plugins`` are there already."""

    @abstractmethod
    def compute(self, args: argparse.Namespace) -> dict[str, Any]:
        """The result, as ``--json`` prints it.

        Raises:
            UserError: the arguments name what cannot be scored.
        """

    def describe(self, result: Mapping[str, Any]) -> str:
        """The result as text, by default one line for each key."""
        return "\n".join(f"{key} {value}" for key, value in result.items())
