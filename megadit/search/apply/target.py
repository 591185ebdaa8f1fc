"""From a study on a proxy to the target's configuration: Algorithm 4 of arXiv 2505.15270.

The base hyperparameters are chosen at the proxy by the study's rule, on the word of a verdict that they transfer, and
laid over the target's configuration. What they become in each parameter group, what does not transfer by itself and
what the search cost go with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config import LoadedConfig, RunConfig, replace
from megadit.config.loading.sources import display, override_layer
from megadit.errors import UserError
from megadit.nested import flatten
from megadit.search.apply.cost import cost, run_steps
from megadit.search.apply.study_verdicts import StudyVerdict, study_verdicts
from megadit.search.apply.target_config import FittedTarget, base_changes, fit_target, write_target
from megadit.search.apply.untransferred import Caveat, untransferred
from megadit.search.results import StudyResults
from megadit.search.selection import SelectedPoint, select
from megadit.search.study.study import Study
from megadit.search.verify_study import proxy_of
from megadit.transfer.budget import TuningCost


class NotVerifiedError(Exception):
    """No verdict "transfers" for what is to be applied: one sentence with the remedy (exit code 3)."""

    def __init__(self, message: str, study_verdicts: Sequence[StudyVerdict]) -> None:
        super().__init__(message)
        self.study_verdicts = tuple(study_verdicts)


@dataclass(frozen=True)
class GroupRow:
    """One optimizer group at the proxy and at the target: its ``lr``, ``wd`` and ``eps``, None where it has none.

    ``lr_mult`` is the target's learning rate over the base one: 1/m for hidden weights.
    """

    name: str
    lr_mult: float | None
    proxy: dict[str, float] | None
    target: dict[str, float] | None


@dataclass(frozen=True)
class WrittenTarget:
    """A target that was written to ``path``.

    ``scale``: where the point was chosen. ``replaced``: what the target said of keys that now have the study's.
    """

    path: Path
    base: Path
    results: StudyResults
    scale: int | None
    choice: SelectedPoint
    study_verdicts: tuple[StudyVerdict, ...]
    forced: str | None
    proxy: RunConfig
    fitted: FittedTarget
    replaced: dict[str, Any]
    groups: tuple[GroupRow, ...]
    caveats: tuple[Caveat, ...]
    tuning_cost: TuningCost

    def verified_by(self, key: str) -> list[StudyVerdict]:
        """The studies that verified the transfer of ``key``."""
        return [each for each in self.study_verdicts if each.span is not None and each.hp == key]

    def verification(self, key: str) -> str:
        """Which studies verified the transfer of ``key``, or that none did."""
        spans = [each.span for each in self.verified_by(key) if each.span is not None]
        if not spans:
            return "NOT verified: transfer verified by no study given"
        words = (f"{span.study} over {span.key} {span.low:g} to {span.high:g}" for span in spans)
        return f"transfer verified by {' and '.join(words)}"

    @property
    def not_verified(self) -> list[str]:
        """The base hyperparameters that were applied though no study's verdict stands behind them."""
        return [key for key in self.choice.hps if not self.verified_by(key)]


def apply(
    results: StudyResults,
    others: Sequence[StudyResults],
    loaded: LoadedConfig,
    base: Path,
    out: str | Path | None = None,
    *,
    force: bool = False,
    manual_multiple: float | None = None,
    overrides: Sequence[str] = (),
) -> WrittenTarget:
    """Write the target's configuration with the base hyperparameters that a study found.

    Args:
        results: of the study.
        others: of studies whose verdicts back the transfer too; needed by a study that has no scale of its own.
        loaded: the target, under muP: the file ``base`` with ``overrides`` (``key.sub=value``).
        out: the file to write; default ``target.yaml`` in the study's directory.
        force: write it whatever the verdicts are.
        manual_multiple: what tuning by hand would cost, in trainings of the target; the cost ratio is against that.

    Raises:
        NotVerifiedError: a verdict is not "transfers", or there is none; not with ``force``.
        UserError: the study has no results or runs under SP, the target is not under muP, or cannot be written.
    """
    if loaded.config.model.parametrization != "mup":
        raise UserError(
            f"model.parametrization: the target {loaded.source} is under {loaded.config.model.parametrization}, where "
            "a proxy's values mean nothing; add model.parametrization=mup and its base width, or name a -mup config"
        )
    study = results.study
    judged = study_verdicts(results, others, force)
    scale = proxy_of(results, next((each.verdict for each in judged if each.results is results), None))
    choice = select(results, scale=scale)
    proxy = proxy_config(study, choice, scale)
    fitted = fit_target(loaded, base_changes(proxy, loaded.config, choice.hps), study.spec.name, run_steps(proxy))
    tuning_cost = cost(results, others, fitted.config, fitted.lengths[1], scale, manual_multiple)
    refusal = _refusal(results, judged, choice)
    if refusal and not force:
        raise NotVerifiedError(refusal, judged)
    configured = flatten(loaded.config.model_dump())
    applied = WrittenTarget(
        path=Path(out).expanduser() if out is not None else study.folder / "target.yaml",
        base=base,
        results=results,
        scale=scale,
        choice=choice,
        study_verdicts=judged,
        forced=refusal,
        proxy=proxy,
        fitted=fitted,
        replaced={key: configured.get(key) for key, value in fitted.changes.items() if configured.get(key) != value},
        groups=tuple(group_rows(proxy, fitted.config)),
        caveats=(
            *untransferred(proxy, fitted.config, fitted.lengths, [each.span for each in judged if each.span]),
            *fitted.caveats,
        ),
        tuning_cost=tuning_cost,
    )
    write_target(applied.path, base, override_layer(overrides).values, fitted, _header(applied, overrides))
    return applied


def proxy_config(study: Study, choice: SelectedPoint, proxy_scale: int | None) -> RunConfig:
    """The run of the first variant at the proxy's scale that ``choice`` speaks of.

    Raises:
        UserError: it is not under muP.
    """
    variant = study.variants[0]
    scale = study.horizons[-1] if study.horizons else proxy_scale
    cell = next(cell for cell in study.cells if cell.variant == variant and cell.scale == scale)
    config = study.config(cell, choice.hps, study.spec.seeds[0])
    if study.horizons:
        config = replace(config, {"train.steps": proxy_scale}, f"study {study.spec.name}")
    if config.model.parametrization != "mup":
        raise UserError(
            f"study {study.spec.name}: its runs{f' of variant {variant}' if variant else ''} are under "
            f"{config.model.parametrization}, whose optimum moves with width; apply a study whose first variant is mup"
        )
    return config


def group_rows(proxy: RunConfig, target: RunConfig) -> list[GroupRow]:
    """The optimizer's groups of both models, matched by role and decay, in the order of ``plan_groups``."""
    ours, theirs = _groups(proxy), _groups(target)
    rows = []
    for stem in dict.fromkeys([*ours, *theirs]):
        for left, right in itertools.zip_longest(ours.get(stem, ()), theirs.get(stem, ())):
            sides = [
                group and {"lr": group["lr"], "wd": group["weight_decay"], "eps": group["eps"]}
                for group in (left, right)
            ]
            rows.append(GroupRow((right or left)["name"], right["lr_mult"] if right else None, *sides))
    return rows


def _groups(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """The optimizer's groups by name without its learning-rate suffix."""
    from megadit.models import build_model
    from megadit.mup.groups import param_groups

    groups: dict[str, list[dict[str, Any]]] = {}
    for group in param_groups(build_model(config.model, device="meta"), config.optim):
        groups.setdefault(group["name"].partition("@")[0], []).append(group)
    return groups


def _refusal(results: StudyResults, judged: Sequence[StudyVerdict], choice: SelectedPoint) -> str | None:
    """Why nothing should be applied, as a sentence; None when every verdict is "transfers"."""
    remedy = "--force writes the target all the same"
    for each in judged:
        if each.span is None:
            answer = each.answer + (f" ({each.reasons[0]})" if each.reasons else "")
            return f'study {each.name}, {each.hp}: the verdict is not "transfers" but {answer}; {remedy}'
    name = results.study.spec.name
    if not judged:
        return (
            f"study {name} has no scale, so it has no verdict of its own; name studies that verified the transfer "
            f"(--verified-by STUDY), or {remedy}"
        )
    if not any(each.hp in choice.hps for each in judged):  # of which each transfers
        verified = ", ".join(f"{each.name}: {each.hp}" for each in judged)
        return f"no study given verified any of {', '.join(choice.hps)} ({verified}); name others, or {remedy}"
    return None


def _header(applied: WrittenTarget, overrides: Sequence[str]) -> list[str]:
    choice, study = applied.choice, applied.results.study
    variant = f", variant {study.variants[0]}" if study.variants[0] else ""
    lines = [
        f"Study {study.spec.name}{variant}, rule {choice.rule}: {choice.score} {choice.value:.6g} over "
        f"{choice.seeds} seed(s), trial(s) {', '.join(map(str, choice.trials))}."
    ]
    lines += [f"Verdict of {each.name} on {each.hp}: {each.answer}." for each in applied.study_verdicts]
    lines += [f"{key}: {applied.verification(key)}." for key in choice.hps]
    lines += [f"{key}: written as {words}." for key, words in applied.fitted.scaled.items()]
    lines += [f"NOT verified: {', '.join(applied.not_verified)}."] if applied.not_verified else []
    lines += [f"Written with --force: {applied.forced}."] if applied.forced else []
    lines += [f"Overrides: {' '.join(overrides)}"] if overrides else []
    return [*lines, f"Target: {display(applied.base)}; proxy: width {applied.proxy.model.width}."]
