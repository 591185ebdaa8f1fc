"""A small study and finished trials with scores written by hand, for tests of what reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from helpers.studies.fabricated import make_study
from megadit.search.results import TrialResult
from megadit.search.study.study import Study

STUDY: dict[str, Any] = {
    "scale": None,
    "seeds": [0],
    "space": {"optim.lr": {"grid": [1.0, 2.0, 4.0, 8.0]}},
    "scores": [{"name": "loss", "kind": "train_loss", "last": 50}],
}


def a_study(**keys: Any) -> Study:
    """STUDY with ``keys`` laid over it, of runs of width 64 and 200 steps; nothing of it stays on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return make_study(Path(folder), "small", **(STUDY | keys))


def a_trial(
    number: int,
    loss: float | None,
    *,
    lr: float = 1.0,
    seed: int = 0,
    variant: str = "",
    scale: float | None = None,
    outcome: str = "complete",
    **others: Any,
) -> TrialResult:
    """A finished trial whose score ``loss`` is the given one (``scores``: several)."""
    values: dict[str, Any] = {
        "number": number, "variant": variant, "scale": scale, "hps": {"optim.lr": lr}, "seed": seed, "outcome": outcome,
        "scores": {"loss": loss}, "horizons": {}, "steps": 200, "global_batch": 32, "parameters": 1000, "flops": 1e9,
        "seconds": 2.0, "overhead_s": 0.1, "reason": "", "run_dir": f"trials/{number:04d}", "attempts": 1,
    }  # fmt: skip
    return TrialResult(**(values | others))
