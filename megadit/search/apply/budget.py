"""What tuning on proxies costs against one training of the target: Eq. 1 of arXiv 2505.15270.

Two forms: the paper's S·B·T (trials × parameters × samples seen, every trial at its full length), and executed
FLOPs, where a diverged or pruned trial counts the steps that it really ran.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megadit.config import RunConfig
from megadit.errors import UserError

if TYPE_CHECKING:
    from megadit.search.results import StudyResults, TrialResult

Stage = tuple[float, float, float]  # trials, parameters, samples of each


def tuning_cost_ratio(
    stages: Sequence[Stage], target: tuple[float, float], manual_multiple: float | None = None
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
    spent = sum(trials * size * seen for trials, size, seen in stages)
    return spent / (parameters * samples * _multiple(manual_multiple))


def study_flops(trials: Iterable[TrialResult]) -> float:
    """FLOPs that these trials executed, forward and backward; diverged and pruned ones count what they ran."""
    return math.fsum(trial.flops for trial in trials)


def target_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of ``steps`` steps of ``config``: three forward passes (forward and backward) per image."""
    from megadit.plan import forward_flops

    return 3.0 * forward_flops(config.model) * config.train.global_batch * steps


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


@dataclass(frozen=True)
class Spent:
    """What a set of trials cost: ``flops`` executed, and the stages of the S·B·T form (samples are images)."""

    trials: int
    flops: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Cost:
    """The bill of a transfer: ``search`` at the proxy alone, ``all`` with every trial of every study used.

    ``target`` is (parameters, images) and ``target_flops`` one training; None where its length is not known.
    """

    search: Spent
    all: Spent
    target: tuple[float, float] | None
    target_flops: float | None
    manual_multiple: float | None = None

    def ratios(self, spent: Spent) -> tuple[float, float] | None:
        """(by executed FLOPs, by S·B·T) of ``spent`` over the target, or over ``manual_multiple`` trainings of it."""
        if self.target is None or self.target_flops is None:
            return None
        by_flops = spent.flops / (self.target_flops * _multiple(self.manual_multiple))
        return by_flops, tuning_cost_ratio(spent.stages, self.target, self.manual_multiple)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a ratio is null where the target's length is not known."""
        plain: dict[str, Any] = {
            "manual_multiple": self.manual_multiple,
            "target": {
                "flops": self.target_flops,
                "parameters": None if self.target is None else self.target[0],
                "samples": None if self.target is None else self.target[1],
            },
        }
        for name, spent in (("search", self.search), ("all", self.all)):
            by_flops, by_samples = self.ratios(spent) or (None, None)
            plain[name] = {
                "trials": spent.trials,
                "flops": spent.flops,
                "stages": [list(stage) for stage in spent.stages],
                "ratio_flops": by_flops,
                "ratio_sbt": by_samples,
            }
        return plain


def cost(
    results: StudyResults,
    others: Sequence[StudyResults],
    target: RunConfig,
    steps: int | None,
    variant: str,
    manual_multiple: float | None = None,
    proxy_scale: int | None = None,
) -> Cost:
    """The bill of ``results``' search for ``target`` (of ``steps`` steps), and of ``others``, which verified it.

    The search is ``variant``'s trials at ``proxy_scale``, by default the study's; all is every trial of every study,
    other variants and scales too.
    """
    from megadit.models import count_parameters

    _multiple(manual_multiple)
    at_proxy = results.study.proxy_scale if proxy_scale is None else proxy_scale
    at_proxy = None if results.study.horizons else at_proxy  # one run scores all horizons
    search = [trial for trial in results.trials if trial.variant == variant and at_proxy in (None, trial.scale)]
    every = _spent([(used, used.trials) for used in (results, *others)])
    if steps is None:
        return Cost(_spent([(results, search)]), every, None, None, manual_multiple)
    size = float(count_parameters(target.model, fixed=False)), float(steps * target.train.global_batch)
    return Cost(_spent([(results, search)]), every, size, target_flops(target, steps), manual_multiple)


def describe_cost(bill: Cost) -> list[str]:
    """The bill as sentences."""
    lines = []
    for name, spent in (("search at the proxy", bill.search), ("every trial of every study used", bill.all)):
        text = f"{name}: {spent.trials} trials, {spent.flops:.3g} FLOPs"
        ratios = bill.ratios(spent)
        if ratios is not None:
            by_flops, by_samples = ratios
            text += f", {percent(by_flops)} of {_against(bill)} (S·B·T form of Eq. 1: {percent(by_samples)})"
        lines.append(text)
    if bill.target_flops is None:
        lines.append("the target's length follows from epochs of data that is not here; give train.steps for the ratio")
    else:
        lines.append(f"one training of the target: {bill.target_flops:.3g} FLOPs")
    return lines


def percent(share: float) -> str:
    """``0.0546`` as ``5.46%``."""
    return f"{100 * share:.3g}%"


def _against(bill: Cost) -> str:
    return "one training" if bill.manual_multiple is None else f"{bill.manual_multiple:g} trainings by hand"


def _multiple(value: float | None) -> float:
    if value is None:
        return 1.0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--manual-multiple: {value:g} is not above 0; give the cost of tuning by hand in trainings")
    return value


def _spent(used: Sequence[tuple[StudyResults, Sequence[TrialResult]]]) -> Spent:
    """What these trials of each study cost; one that failed before its model was built cost nothing."""
    counted: Counter[tuple[float, float]] = Counter()
    for results, trials in used:
        lengths = _planned_steps(results)
        for trial in trials:
            if trial.parameters:
                steps = trial.hps.get("train.steps") or lengths.get((trial.variant, trial.scale)) or trial.steps
                counted[float(trial.parameters), float(steps * trial.global_batch)] += 1
    stages = tuple((float(number), size, seen) for (size, seen), number in sorted(counted.items()))
    every = [trial for _, trials in used for trial in trials]
    return Spent(len(every), study_flops(every), stages)


def _planned_steps(results: StudyResults) -> dict[tuple[str, float | None], int | None]:
    """The full length of a run by (variant, scale); None where it is not given in steps."""
    study = results.study
    point = next(study.space.corners())
    return {
        (cell.variant, cell.scale): study.config(cell, point, study.spec.seeds[0]).train.steps for cell in study.cells
    }
