"""The optuna studies behind a study: one per cell, so that pruners and samplers compare runs of one kind only."""

from __future__ import annotations

from typing import Any

from megadit.keys import stream_key
from megadit.search.study.spec import PruningSpec
from megadit.search.study.study import Study

_HALVING_FACTOR = 2


def open_cell(study: Study, storage: Any, name: str, create: bool) -> Any:
    """The optuna study called ``name``; made if there is none and ``create`` is set, else None."""
    import optuna

    # Points are planned, so nothing is drawn from this sampler; TPE's is made per claim.
    settings: dict[str, Any] = {"sampler": optuna.samplers.RandomSampler(seed=0), "pruner": _pruner(study.spec.pruning)}
    try:
        return optuna.load_study(study_name=name, storage=storage, **settings)
    except KeyError:
        if not create:
            return None
    minimize = study.spec.scores[0].lower_is_better
    direction = optuna.study.StudyDirection.MINIMIZE if minimize else optuna.study.StudyDirection.MAXIMIZE
    return optuna.create_study(study_name=name, storage=storage, direction=direction, **settings)


def _pruner(spec: PruningSpec) -> Any:
    import optuna

    if spec.rule == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=spec.after, interval_steps=spec.every)
    if spec.rule == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, spec.after), reduction_factor=_HALVING_FACTOR)
    return optuna.pruners.NopPruner()


def suggest_by_tpe(study: Study, cell: Any, storage: Any, trial_id: int) -> dict[str, Any]:
    """A point from TPE for a trial of the optuna study ``cell``, given all that is known now.

    The draw is keyed by the trial, not by the worker that claims it.
    """
    import optuna

    seed = stream_key(study.spec.sampler_seed, "search", "tpe", storage.get_trial(trial_id).number) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    trial = optuna.trial.Trial(
        optuna.load_study(study_name=cell.study_name, storage=storage, sampler=sampler), trial_id
    )
    return {dimension.key: dimension.suggest(trial) for dimension in study.space.dimensions}
