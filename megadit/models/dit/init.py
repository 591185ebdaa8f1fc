"""The start of official DiT, ``initialize_weights`` (arXiv 2212.09748).

xavier_uniform on linears and on the flattened patch embedding, N(0, .02) on the label table and the timestep MLP.
"""

from __future__ import annotations

from collections.abc import Mapping

from megadit.mup.rules import SMALL, XAVIER, InitRule

ORIGINAL: Mapping[str, InitRule] = {"linear": XAVIER, "patch": XAVIER, "timestep": SMALL, "text": SMALL, "table": SMALL}
