"""MMDiT here starts as official DiT does (arXiv 2212.09748, ``initialize_weights``)."""

from __future__ import annotations

from collections.abc import Mapping

from megadit.mup.rules import SMALL, XAVIER, InitRule

ORIGINAL: Mapping[str, InitRule] = {"linear": XAVIER, "patch": XAVIER, "timestep": SMALL, "text": SMALL, "table": SMALL}
