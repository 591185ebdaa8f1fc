"""What tuning on proxies costs against one training of the target: Eq. 1 of arXiv 2505.15270.

Two forms: the paper's S·B·T (trials × parameters × samples seen, every trial at its full length), and executed
FLOPs, where a diverged or pruned trial counts the steps that it really ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megadit.errors import UserError

TuningStage = tuple[float, float, float]  # trials, parameters, samples of each


def tuning_cost_ratio(
    stages: Sequence[TuningStage], target: tuple[float, float], manual_multiple: float | None = None
) -> float:
    """Cost of all tuning stages over that of training the target once, in the S·B·T form of Eq. 1.

    ``stages``: (trials, parameters, samples per trial) each; ``target``: (parameters, samples). Samples may be
    counted in any unit (images, epochs, steps of one batch) that all share. With ``manual_multiple``, what
    tuning by hand on the target would cost in trainings of it, the ratio is against that cost.

    The paper's: 5 trials of .04B over 5 epochs against .61B over 30 give .0546 (PixArt-α); 80 of .18B over 30K steps
    and 5 of .18B over 100K against 18B over 200K give .145 (MMDiT), and .029 of five trainings.

    Raises:
        UserError: a negative stage, a target that costs nothing, or a multiple that is not above 0.
    """
    if not stages or any(not math.isfinite(n) or n < 0 for stage in stages for n in stage):
        raise UserError(f"stages: {list(stages)} must be (trials, parameters, samples), one or more, none negative")
    parameters, samples = target
    if not (parameters > 0 and samples > 0):
        raise UserError(f"target: {target} must be (parameters, samples), both above 0")
    tuning = sum(trials * size * samples_each for trials, size, samples_each in stages)
    return tuning / (parameters * samples * _multiple(manual_multiple))


@dataclass(frozen=True)
class TrialCost:
    """What a set of trials cost: ``flops`` executed, and the stages of the S·B·T form (samples are images)."""

    trials: int
    flops: float
    stages: tuple[TuningStage, ...]


@dataclass(frozen=True)
class TuningCost:
    """What tuning for a transfer cost: ``search`` at the proxy alone, ``all`` with every trial of every study used.

    ``target`` is one training of the target; None where its length is not known.

    Raises:
        UserError: ``manual_multiple`` is not above 0.
    """

    search: TrialCost
    all: TrialCost
    target: TrialCost | None
    manual_multiple: float | None = None

    def __post_init__(self) -> None:
        _multiple(self.manual_multiple)

    def ratios(self, trial_cost: TrialCost) -> tuple[float, float] | None:
        """(by executed FLOPs, by S·B·T) of ``trial_cost`` over the target, or over ``manual_multiple`` trainings."""
        if self.target is None:
            return None
        by_flops = trial_cost.flops / (self.target.flops * _multiple(self.manual_multiple))
        return by_flops, tuning_cost_ratio(trial_cost.stages, self.target.stages[0][1:], self.manual_multiple)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a ratio is null where the target's length is not known."""
        target = (None, None, None) if self.target is None else (self.target.flops, *self.target.stages[0][1:])
        plain: dict[str, Any] = {"manual_multiple": self.manual_multiple}
        plain["target"] = dict(zip(("flops", "parameters", "samples"), target, strict=True))
        for name, trial_cost in (("search", self.search), ("all", self.all)):
            by_flops, by_samples = self.ratios(trial_cost) or (None, None)
            plain[name] = {**asdict(trial_cost), "ratio_flops": by_flops, "ratio_sbt": by_samples}
        return plain


def describe_tuning_cost(cost: TuningCost) -> list[str]:
    """The cost as sentences."""
    lines = []
    against = "one training" if cost.manual_multiple is None else f"{cost.manual_multiple:g} trainings by hand"
    for name, trial_cost in (("search at the proxy", cost.search), ("every trial of every study used", cost.all)):
        text = f"{name}: {trial_cost.trials} trials, {trial_cost.flops:.3g} FLOPs"
        ratios = cost.ratios(trial_cost)
        if ratios is not None:
            by_flops, by_samples = (f"{100 * share:.3g}%" for share in ratios)
            text += f", {by_flops} of {against} (S·B·T form of Eq. 1: {by_samples})"
        lines.append(text)
    if cost.target is None:
        lines.append("the target's length follows from epochs of data that is not here; give train.steps for the ratio")
    else:
        lines.append(f"one training of the target: {cost.target.flops:.3g} FLOPs")
    return lines


def _multiple(value: float | None) -> float:
    if value is None:
        return 1.0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--manual-multiple: {value:g} is not above 0; give the cost of tuning by hand in trainings")
    return value
