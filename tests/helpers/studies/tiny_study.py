"""Studies that really run, of the smallest model on digits, and results written by hand for claims on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from helpers.training import BASE
from megadit.search.results import TrialResult
from megadit.search.storage.records import TrialAttempt
from megadit.search.study.study import Study, load_study

TINY: dict[str, Any] = {
    "base": {
        **{name: dict(section) for name, section in BASE.items()},
        "model": {**BASE["model"], "width": 16, "depth": 1, "heads": 1},
        "optim": {"lr": 4e-3},
    },
    "space": {"optim.lr": {"grid": [0.001, 0.002, 0.004]}},
    "sampler": "grid",
    "proxy": {"steps": 6},
    "scores": [{"name": "loss", "kind": "train_loss", "last": 3}],
    "diverged_above": 100.0,  # runs so short may end a little above their beginning
}


def tiny_study(folder: Path, **keys: Any) -> Study:
    """TINY with ``keys`` laid over it (None takes a key out), to run in ``folder``/study."""
    values = {key: value for key, value in {**TINY, **keys}.items() if value is not None}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(_lists(values)))
    return load_study(file, folder / "study")


def _lists(value: Any) -> Any:
    """With lists for tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def result_for(claim: TrialAttempt, loss: float | None = 1.0, outcome: str = "complete", **others: Any) -> TrialResult:
    """A result of the claimed trial, as if it had run."""
    values: dict[str, Any] = {
        "number": claim.number, "variant": claim.variant, "scale": claim.scale, "hps": claim.hps, "seed": claim.seed,
        "outcome": outcome, "scores": {"loss": loss}, "horizons": {}, "steps": 6, "global_batch": 16,
        "parameters": 1000, "flops": 1e9, "seconds": 2.0, "overhead_s": 0.1, "reason": "", "run_dir": "",
        "attempts": claim.attempt,
    }  # fmt: skip
    return TrialResult(**(values | others))
