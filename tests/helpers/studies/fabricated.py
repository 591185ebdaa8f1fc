"""Results of studies that nobody ran: every planned trial gets the scores that a function of the test gives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megadit.config import ModelConfig
from megadit.models import count_parameters
from megadit.plan import forward_flops
from megadit.search.results import COMPLETE, DIVERGED, StudyResults, TrialResult
from megadit.search.study.plan import PlannedTrial, plan_trials
from megadit.search.study.study import Study, load_study

# (trial, scale: the trial's, or one of its horizons) -> the loss, None for a diverged run
Loss = Callable[[PlannedTrial, float], float | None]

BASE: dict[str, Any] = {
    "model": {
        "width": 64,
        "depth": 2,
        "head_dim": 16,
        "patch_size": 2,
        "in_channels": 1,
        "input_size": 8,
        "learn_sigma": False,
        "num_classes": 10,
        "parametrization": "mup",
        "base_width": 64,
    },
    "objective": {"kind": "flow"},
    "data": {"name": "digits"},
    "train": {"steps": 200, "global_batch": 32},
}
WIDTHS: dict[str, Any] = {
    "base": BASE,
    "scale": {"key": "model.width", "values": [32, 64, 128]},
    "space": {"optim.lr": {"grid": ["2^-10", "2^-9", "2^-8", "2^-7", "2^-6", "2^-5"]}},
    "sampler": "grid",
    "seeds": [0, 1],
}


def make_study(folder: Path, name: str = "widths", **changes: Any) -> Study:
    """A study over widths on digits, with whole keys of its file replaced; its directory is ``folder/name``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    values = {key: value for key, value in {**WIDTHS, **changes}.items() if value is not None}
    file.write_text(yaml.safe_dump(values))
    return load_study(file, folder / name)


def valley(drift: float = 0.0, best: float = -7.0, seeds: Mapping[int, float] | None = None) -> Loss:
    """A parabola over log2 of the learning rate whose optimum moves by ``drift`` octaves per octave of scale / 64."""
    offsets = seeds or {0: -0.002, 1: 0.002}

    def loss(trial: PlannedTrial, scale: float) -> float | None:
        octave = math.log2(scale / 64)
        distance = math.log2(trial.hps["optim.lr"]) - (best + drift * octave)
        return None if distance > 3.6 else 0.6 + 0.05 * distance**2 - 0.02 * octave + offsets[trial.seed]

    return loss


def fabricate(study: Study, loss: Loss, keep: Callable[[PlannedTrial], bool] = lambda trial: True) -> StudyResults:
    """All planned trials finished with every score at ``loss``; those that ``keep`` refuses still wait."""
    planned = plan_trials(study)
    done = tuple(_finished(study, trial, loss) for trial in planned if keep(trial))
    return StudyResults(study, done, len(planned))


@cache
def _size(model: str) -> tuple[int, int]:
    """(parameters, forward FLOPs) of a model given as JSON; the same few models come again and again.

    Counted by the functions as they were imported: what a test puts in their place would stay in the cache after it.
    """
    config = ModelConfig.model_validate_json(model)
    return count_parameters(config, fixed=False), forward_flops(config)


def _finished(study: Study, trial: PlannedTrial, loss: Loss) -> TrialResult:
    cell = next(cell for cell in study.cells if (cell.variant, cell.scale) == (trial.variant, trial.scale))
    config = study.config(cell, trial.hps, trial.seed)
    assert config.train.steps is not None
    scale = float(study.base.model.width if trial.scale is None else trial.scale)
    value = loss(trial, scale)
    parameters, flops = _size(config.model.model_dump_json())
    steps = config.train.steps if value is not None else config.train.steps // 4  # diverged ones stop early

    def scores(at: float) -> dict[str, float | None]:
        return {score.name: loss(trial, at) for score in study.spec.scores}

    return TrialResult(
        number=trial.number,
        variant=trial.variant,
        scale=trial.scale,
        hps=dict(trial.hps),
        seed=trial.seed,
        outcome=COMPLETE if value is not None else DIVERGED,
        scores=scores(scale),
        horizons={horizon: scores(horizon) for horizon in study.horizons},
        steps=steps,
        global_batch=config.train.global_batch,
        parameters=parameters,
        flops=3.0 * flops * config.train.global_batch * steps,
        seconds=1.0,
        overhead_s=0.1,
        reason="" if value is not None else "loss is not finite",
        run_dir=f"trials/{trial.number:04d}",
        attempts=1,
    )


def store(results: StudyResults) -> Path:
    """Put the results into the study's own store, as a worker would; returns the study directory."""
    from megadit.search.storage.identity import this_worker
    from megadit.search.storage.store import StudyStore

    store, worker = StudyStore.create_or_open(results.study), this_worker()
    by_number = {trial.number: trial for trial in results.trials}
    while (claim := store.claim(worker)) is not None and claim.number in by_number:
        assert store.finish(claim, by_number[claim.number], worker)
    return results.study.folder
