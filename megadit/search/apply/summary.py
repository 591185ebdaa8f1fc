"""What ``apply`` did, as plain data and as lines for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from megadit.config.loading.sources import display
from megadit.search.apply.target import WrittenTarget
from megadit.search.wording import value_text
from megadit.tables import aligned
from megadit.transfer.budget import describe_tuning_cost


def to_json(applied: WrittenTarget) -> dict[str, Any]:
    """Everything that ``describe`` tells, as plain data."""
    choice, study, fitted, model = applied.choice, applied.results.study, applied.fitted, applied.fitted.config.model
    return {
        "written": str(applied.path),
        "base": str(applied.base),
        "study": study.spec.name,
        "variant": study.variants[0],
        "scale": applied.scale,
        **asdict(choice),
        "backed_by": {key: [b.name for b in applied.verified_by(key)] for key in choice.hps},
        "not_verified": applied.not_verified,
        "verdicts": [each.to_json() for each in applied.study_verdicts],
        "forced": applied.forced,
        "changes": fitted.changes,
        "scaled": fitted.scaled,
        "replaced": applied.replaced,
        "m": {"proxy": applied.proxy.model.width_mult, "target": model.width_mult},
        "width": {"proxy": applied.proxy.model.width, "target": model.width},
        "base_width": model.base_width,
        "groups": [asdict(row) for row in applied.groups],
        "untransferred": [asdict(caveat) for caveat in applied.caveats],
        "cost": applied.tuning_cost.to_json(),
    }


def describe(applied: WrittenTarget) -> str:
    """The transfer as lines: what was chosen and why, rates by group, what does not transfer, cost, the file."""
    choice, study, spec = applied.choice, applied.results.study, applied.results.study.spec
    scale = "" if spec.scale is None else f" at {spec.scale.key} {applied.scale}"
    variant = f" ({study.variants[0]})" if study.variants[0] else ""
    trials = ", ".join(map(str, choice.trials))
    lines = [
        f"study {spec.name}{variant}: rule {choice.rule}{scale}, {choice.score} {choice.value:.5g} over {choice.seeds} "
        f"seed(s), trial(s) {trials}",
        *(f"verdict of {each.name} on {each.hp}: {each.answer}" for each in applied.study_verdicts),
    ]
    if applied.forced:
        lines.append(f"forced: {applied.forced}")
    lines += ["", "base hyperparameters"]
    lines += [f"  {key} = {value_words(value)}: {applied.verification(key)}" for key, value in choice.hps.items()]
    lines += [f"  {key} is written as {words}" for key, words in applied.fitted.scaled.items()]
    lines += [f"  {line}" for line in _other_best(applied)]
    for key, old in applied.replaced.items():
        if key not in choice.hps:
            new, old_text = value_words(applied.fitted.changes[key]), value_words(old)
            lines.append(f"  {key} = {new}: the study's, with which these are valid; the target said {old_text}")
    lines += ["", *_group_table(applied)]
    if applied.caveats:
        lines += ["", "does not transfer by itself", *(f"  - {caveat.text}" for caveat in applied.caveats)]
    lines += ["", "cost of the search", *(f"  {line}" for line in describe_tuning_cost(applied.tuning_cost))]
    shown = display(applied.path)
    lines += ["", f"written to {shown}; train it with: python launch/pretrain.py --config {shown}"]
    return "\n".join(lines)


def value_words(value: Any) -> str:
    """A value for people; beside a power of two, the number that it is."""
    text = value_text(value, 6)
    return f"{value:.6g} ({text})" if isinstance(value, float) and text.startswith("2^") else text


def _other_best(applied: WrittenTarget) -> list[str]:
    """Where a verdict's own best value over all its scales is not what the rule chose at the proxy."""
    lines = []
    for key, chosen in applied.choice.hps.items():
        for judged in applied.verified_by(key):
            best = judged.verdict.best if judged.verdict is not None else None
            if best is None or not isinstance(chosen, int | float) or math.isclose(best, chosen, rel_tol=1e-6):
                continue
            lines.append(f"{key}: over all its scales {judged.name} finds {value_words(best)} best")
    return lines


def _group_table(applied: WrittenTarget) -> list[str]:
    """Learning rate, weight decay and epsilon of every group at the proxy and at the target, side by side."""
    one, other = applied.proxy.model, applied.fitted.config.model
    head = (
        f"base width {other.base_width}: proxy width {one.width}, m = {one.width_mult:.4g}; "
        f"target width {other.width}, m = {other.width_mult:.4g}"
    )
    columns = [(key, side) for key in ("lr", "wd", "eps") for side in ("proxy", "target")]
    cells = [
        [row.name, *(f"{values[key]:.6g}" if (values := getattr(row, side)) else "-" for key, side in columns)]
        for row in applied.groups
    ]
    return [head, aligned(["group", *map(" ".join, columns)], cells)]
