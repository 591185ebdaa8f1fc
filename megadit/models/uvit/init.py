"""The start of official uvit.py: N(0, .02) on all linears and positions; torch's own of convolutions and labels."""

from __future__ import annotations

from collections.abc import Mapping

from megadit.mup.rules import SMALL, InitRule

ORIGINAL: Mapping[str, InitRule] = {
    "linear": SMALL,
    "patch": InitRule("kaiming_uniform"),
    "patch_bias": InitRule("kaiming_uniform"),
    "timestep": SMALL,
    "text": SMALL,
    "table": InitRule("normal", 1.0),
    "readout": SMALL,
}
