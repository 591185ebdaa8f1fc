"""How much each searched HP decides about the score: functional ANOVA on a random forest, with a control.

The forest (optuna's fANOVA, Hutter et al. 2014) explains the *ranks* of the points' scores. Losses grow without bound
towards the stability edge, and a single bad point would carry all variance; ranks also give points that diverged a
rank: the worst, shared. A made-up HP of random values goes in beside the real ones. What it gets is what a HP gets
that cannot matter, and no HP below it can be told from noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit.transfer.ties import at_most, ranks

_PER_HP = 6  # fewer points than this for each HP (and 12 in all) say nothing: the control is then among the first
_CONTROL = "a HP that cannot matter (control)"


@dataclass(frozen=True)
class Importance:
    """Shares of the explained variance of ranks: HPs from the largest down, and the control's."""

    shares: tuple[tuple[str, float], ...]
    control: float
    points: int
    diverged: int


def points_needed(hps: int) -> int:
    """How many points make an estimate for this many HPs."""
    return max(12, _PER_HP * hps)


def measure_importance(
    points: Sequence[tuple[Mapping[str, Any], float | None]], lower_is_better: bool
) -> Importance | str:
    """Importance of the HPs of ``points`` (HPs, score); a point without a finite score diverged and is the worst.

    Returns:
        The shares, or a sentence that says why there are none.
    """
    names = [name for name in points[0][0] if len({repr(hps[name]) for hps, _ in points}) > 1] if points else []
    if len(names) < 2:
        return "Importance compares HPs, and fewer than two were varied."
    if len(points) < points_needed(len(names)):
        return (
            f"Importance is not estimated from {len(points)} finished points; "
            f"{len(names)} HPs need at least {points_needed(len(names))}."
        )
    sign = 1.0 if lower_is_better else -1.0
    losses = sign * np.array([score for _, score in points], dtype=float)
    losses[~np.isfinite(losses)] = math.inf
    score_ranks = ranks(losses)
    if np.ptp(score_ranks) == 0:
        return "Importance is not estimated: all finished points have the same score."
    shares = _fanova([hps for hps, _ in points], names, score_ranks)
    control = shares.pop(_CONTROL)
    return Importance(tuple(shares.items()), control, len(points), int(np.isinf(losses).sum()))


def _fanova(points: Sequence[Mapping[str, Any]], names: Sequence[str], score_ranks: np.ndarray) -> dict[str, float]:
    """Shares of the named HPs and of the control, the largest first."""
    import optuna

    from megadit.search.storage.locking import quiet_optuna

    quiet_optuna()
    rng = np.random.default_rng(0)
    columns = {name: _categories_or_numbers([hps[name] for hps in points]) for name in names}
    distributions = {name: _distribution(values) for name, values in columns.items()}
    distributions[_CONTROL] = optuna.distributions.FloatDistribution(0.0, 1.0)
    study = optuna.create_study()
    for point, rank in enumerate(score_ranks):
        params = {name: values[point] for name, values in columns.items()} | {_CONTROL: float(rng.random())}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(rank)))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _categories_or_numbers(values: Sequence[Any]) -> Sequence[Any]:
    """The values themselves where all are numbers, else a word for each: lists are no categories of optuna's."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values
    return [repr(value) for value in values]


def _distribution(values: Sequence[Any]) -> Any:
    """The range of the values, logarithmic where they span more than a factor of ten; a list where they are words."""
    import optuna

    if isinstance(values[0], str):
        return optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(values)))
    low, high = float(min(values)), float(max(values))
    return optuna.distributions.FloatDistribution(low, high, log=spans_decades(low, high))


def spans_decades(low: float, high: float) -> bool:
    """Whether values between these are best seen on a logarithmic axis."""
    return low > 0 and not at_most(high, 10 * low, high)
