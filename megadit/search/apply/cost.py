"""What the trials of studies cost, and one training of the target: what ``megadit.transfer.budget`` compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.search.results import StudyResults, TrialResult
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
    variant: str,
    manual_multiple: float | None = None,
    proxy_scale: int | None = None,
) -> TuningCost:
    """The cost of ``results``' search for ``target`` (of ``steps`` steps), and of ``others``, which verified it.

    The search is ``variant``'s trials at ``proxy_scale``, by default the study's; all is every trial of every study,
    other variants and scales too.

    Raises:
        UserError: ``manual_multiple`` is not above 0.
    """
    from megadit.models import count_parameters
    from megadit.plan import training_flops

    at_proxy = results.study.proxy_scale if proxy_scale is None else proxy_scale
    at_proxy = None if results.study.horizons else at_proxy  # one run scores all horizons
    at_proxy_alone = [t for t in results.trials if t.variant == variant and at_proxy in (None, t.scale)]
    search = _spent([(results, at_proxy_alone)])
    every = _spent([(used, used.trials) for used in (results, *others)])
    if steps is None:
        return TuningCost(search, every, None, None, manual_multiple)
    size = float(count_parameters(target.model, fixed=False)), float(steps * target.train.global_batch)
    return TuningCost(search, every, size, training_flops(target, steps), manual_multiple)


def _spent(used: Sequence[tuple[StudyResults, Sequence[TrialResult]]]) -> TrialCost:
    """What these trials of each study cost; one that failed before its model was built cost nothing."""
    stages: Counter[tuple[float, float]] = Counter()
    for results, trials in used:
        study = results.study
        # The full length of a run; None where it is not given in steps.
        lengths: dict[tuple[str, float | None], int | None] = {
            (cell.variant, cell.scale): study.first_run(cell).train.steps for cell in study.cells
        }
        for trial in trials:
            if trial.parameters:
                steps = trial.hps.get("train.steps") or lengths.get((trial.variant, trial.scale)) or trial.steps
                stages[float(trial.parameters), float(steps * trial.global_batch)] += 1
    every = [trial for _, trials in used for trial in trials]
    return TrialCost(
        len(every),
        math.fsum(trial.flops for trial in every),
        tuple((float(number), size, seen) for (size, seen), number in sorted(stages.items())),
    )
