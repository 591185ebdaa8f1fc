"""``tools/transfer.py apply``: what it prints, as text or as one JSON object, and its exit codes."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.config.loading.sources import display
from megadit.errors import EXIT_OK, EXIT_VERDICT_NO
from megadit.search.apply.backing import Backing, backed_by
from megadit.search.apply.budget import describe_cost
from megadit.search.apply.target import Applied, GroupRow, NotVerifiedError, apply, backing_words, not_verified
from megadit.search.wording import value_text
from megadit.streams import result_is_saved


def run_apply(args: Namespace) -> int:
    """Apply what the command line says; 3 when a verdict is not "transfers". Raises UserError for bad input.

    ``args`` has study, target, out, verified_by, force, manual_multiple, json and overrides.
    """
    verified_by, overrides = list(args.verified_by or ()), list(args.overrides)
    for word in [word for word in verified_by if "=" in word and not Path(word).exists()]:
        verified_by.remove(word)  # --verified-by STUDY … takes every word up to the next option
        overrides.append(word)
    try:
        applied = apply(
            args.study,
            args.target,
            args.out,
            verified_by,
            args.force,
            args.manual_multiple,
            overrides,
        )
    except NotVerifiedError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        if args.json:
            plain = {"written": None, "refused": str(refusal), "verdicts": [_backing_json(b) for b in refusal.found]}
            print(json.dumps(plain, allow_nan=False))
        return EXIT_VERDICT_NO
    missing = not_verified(applied)
    if missing:
        print(
            f"warning: NOT verified: no study given judged the transfer of {', '.join(missing)}; name one that did by "
            "--verified-by",
            file=sys.stderr,
        )
    result_is_saved(as_json=args.json)
    print(json.dumps(to_json(applied), allow_nan=False) if args.json else describe(applied))
    return EXIT_OK


def to_json(applied: Applied) -> dict[str, Any]:
    """Everything that ``describe`` tells, as plain data."""
    choice, model = applied.choice, applied.target.model
    return {
        "written": str(applied.path),
        "base": str(applied.base),
        "study": applied.results.study.spec.name,
        "variant": applied.variant,
        "scale": applied.scale,
        "rule": choice.rule,
        "score": choice.score,
        "value": choice.value,
        "seeds": choice.seeds,
        "trials": list(choice.trials),
        "hps": dict(choice.hps),
        "backed_by": {key: [b.name for b in backed_by(key, applied.backings)] for key in choice.hps},
        "not_verified": not_verified(applied),
        "verdicts": [_backing_json(backing) for backing in applied.backings],
        "forced": applied.forced,
        "changes": applied.changes,
        "scaled": applied.scaled,
        "replaced": applied.replaced,
        "m": {"proxy": applied.proxy.model.width_mult, "target": model.width_mult},
        "width": {"proxy": applied.proxy.model.width, "target": model.width},
        "base_width": model.base_width,
        "groups": [_group_json(row) for row in applied.groups],
        "untransferred": [vars(note) for note in applied.notes],
        "cost": applied.bill.to_json(),
    }


def describe(applied: Applied) -> str:
    """The transfer as lines: what was chosen and why, rates by group, what does not transfer, cost, the file."""
    choice, spec = applied.choice, applied.results.study.spec
    scale = "" if spec.scale is None else f" at {spec.scale.key} {applied.scale}"
    variant = f" ({applied.variant})" if applied.variant else ""
    trials = ", ".join(map(str, choice.trials))
    lines = [
        f"study {spec.name}{variant}: rule {choice.rule}{scale}, {choice.score} {choice.value:.5g} over {choice.seeds} "
        f"seed(s), trial(s) {trials}",
        *(f"verdict of {backing.name} on {backing.hp}: {backing.answer}" for backing in applied.backings),
    ]
    if applied.forced:
        lines.append(f"forced: {applied.forced}")
    lines += ["", "base hyperparameters"]
    lines += [f"  {key} = {value_words(value)}: {backing_words(applied, key)}" for key, value in choice.hps.items()]
    lines += [f"  {key} is written as {words}" for key, words in applied.scaled.items()]
    lines += [f"  {line}" for line in _other_best(applied)]
    for key, old in applied.replaced.items():
        if key not in choice.hps:
            new, said = value_words(applied.changes[key]), value_words(old)
            lines.append(f"  {key} = {new}: the study's, with which these are valid; the target said {said}")
    lines += ["", *_group_table(applied)]
    if applied.notes:
        lines += ["", "does not transfer by itself", *(f"  - {note.text}" for note in applied.notes)]
    lines += ["", "cost of the search", *(f"  {line}" for line in describe_cost(applied.bill))]
    shown = display(applied.path)
    lines += ["", f"written to {shown}; train it with: python launch/pretrain.py --config {shown}"]
    return "\n".join(lines)


def value_words(value: Any) -> str:
    """A value for people; beside a power of two, the number that it is."""
    text = value_text(value, 6)
    return f"{value:.6g} ({text})" if isinstance(value, float) and text.startswith("2^") else text


def _other_best(applied: Applied) -> list[str]:
    """Where a verdict's own best value over all its scales is not what the rule chose at the proxy."""
    lines = []
    for key, chosen in applied.choice.hps.items():
        for backing in backed_by(key, applied.backings):
            best = backing.verdict.best if backing.verdict is not None else None
            if best is None or not isinstance(chosen, int | float) or math.isclose(best, chosen, rel_tol=1e-6):
                continue
            lines.append(f"{key}: over all its scales {backing.name} finds {value_words(best)} best")
    return lines


def _group_table(applied: Applied) -> list[str]:
    """Learning rate, weight decay and epsilon of every group at the proxy and at the target, side by side."""
    one, other = applied.proxy.model, applied.target.model
    head = [
        f"base width {other.base_width}: proxy width {one.width}, m = {one.width_mult:.4g}; "
        f"target width {other.width}, m = {other.width_mult:.4g}"
    ]
    columns = ["group", *(f"{name} {place}" for name in ("lr", "wd", "eps") for place in ("proxy", "target"))]
    cells = [columns, *([row.name, *_cells(row)] for row in applied.groups)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return head + [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]


def _cells(row: GroupRow) -> Sequence[str]:
    return [
        "-" if values is None else f"{values[index]:.6g}" for index in range(3) for values in (row.proxy, row.target)
    ]


def _group_json(row: GroupRow) -> dict[str, Any]:
    names = ("lr", "wd", "eps")
    sides = {
        place: None if values is None else dict(zip(names, values, strict=True))
        for place, values in (("proxy", row.proxy), ("target", row.target))
    }
    return {"name": row.name, "lr_mult": row.share, **sides}


def _backing_json(backing: Backing) -> dict[str, Any]:
    span = backing.span
    return {
        "study": backing.name,
        "verdict": None if backing.verdict is None else backing.verdict.verdict,
        "why": backing.why or None,
        "hp": backing.hp,
        "reasons": [] if backing.verdict is None else list(backing.verdict.reasons),
        "verified": None if span is None else {"key": span.key, "low": span.low, "high": span.high},
    }
