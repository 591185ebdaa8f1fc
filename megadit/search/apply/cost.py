"""What the trials of studies cost, and one training of the target: what ``megadit.transfer.budget`` compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.search.results import StudyResults
from megadit.transfer.budget import TrialCost, TuningCost


def run_steps(config: RunConfig) -> int | None:
    """Optimizer steps of a run; None where they follow from epochs and its data is not readable on this machine."""
    if config.train.steps is not None:
        return config.train.steps
    from megadit.data import build_datasets
    from megadit.train.prepare import total_steps

    try:
        train_set, _ = build_datasets(config.data, config.model.num_classes)
    except UserError:
        return None
    return total_steps(config, len(train_set))


def cost(
    results: StudyResults,
    others: Sequence[StudyResults],
    target: RunConfig,
    steps: int | None,
    proxy_scale: int | None,
    manual_multiple: float | None = None,
) -> TuningCost:
    """The cost of ``results``' search for ``target`` (of ``steps`` steps), and of ``others``, which verified it.

    The search is the first variant's trials at ``proxy_scale``; all is every trial of every study, other variants and
    scales too.

    Raises:
        UserError: ``manual_multiple`` is not above 0.
    """
    from megadit.models import count_parameters
    from megadit.plan import training_flops

    at = None if results.study.horizons else proxy_scale  # one run scores all horizons
    searched = [t for t in results.trials if t.variant == results.study.variants[0] and at in (None, t.scale)]
    search, every = _spent([replace(results, trials=tuple(searched))]), _spent([results, *others])
    if steps is None:
        return TuningCost(search, every, None, manual_multiple)
    size = float(count_parameters(target.model, fixed=False)), float(steps * target.train.global_batch)
    return TuningCost(search, every, TrialCost(1, training_flops(target, steps), ((1.0, *size),)), manual_multiple)


def _spent(studies: Sequence[StudyResults]) -> TrialCost:
    """What the trials of these studies cost; one that failed before its model was built cost nothing."""
    stages: Counter[tuple[float, float]] = Counter()
    for results in studies:
        study = results.study
        # The full length of a run; None where it is not given in steps.
        lengths: dict[tuple[str, float | None], int | None] = {
            (cell.variant, cell.scale): study.first_run(cell).train.steps for cell in study.cells
        }
        for trial in results.trials:
            if trial.parameters:
                steps = trial.hps.get("train.steps") or lengths.get((trial.variant, trial.scale)) or trial.steps
                stages[float(trial.parameters), float(steps * trial.global_batch)] += 1
    trials = [trial for results in studies for trial in results.trials]
    by_size = tuple((float(count), *size) for size, count in sorted(stages.items()))
    return TrialCost(len(trials), math.fsum(trial.flops for trial in trials), by_size)
