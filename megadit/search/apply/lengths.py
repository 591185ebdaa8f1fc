"""Warm-up and decay that a study found in steps and that do not fit the target's run are written as shares of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadit.config import LoadedConfig, RunConfig
from megadit.errors import UserError
from megadit.search.apply.target_file import apply_changes
from megadit.search.apply.untransferred import Note

_KEYS = ("optim.warmup_steps", "optim.decay_steps")


@dataclass(frozen=True)
class FittedTarget:
    """The target with ``changes`` laid over it.

    scaled: of each key that became a share, what is to be told.  notes: how its schedule still does not fit its run.
    """

    config: RunConfig
    changes: dict[str, Any]
    scaled: dict[str, str]
    notes: tuple[Note, ...] = ()


def fit_lengths(
    loaded: LoadedConfig,
    target: RunConfig,
    changes: dict[str, Any],
    study: str,
    lengths: tuple[int | None, int | None],
) -> FittedTarget:
    """``target``, which is ``loaded`` with ``changes``; where its schedule does not fit its run, lengths among the
    changes become the shares that they were of the proxy's run.

    lengths: optimizer steps of proxy and target, None where not known.

    Raises:
        UserError: as ``apply_changes`` does.
    """
    proxy_steps, target_steps = lengths
    problem = _problem(target, target_steps)
    if problem is None or target_steps is None:
        return FittedTarget(target, changes, {})
    shares = _shares(changes, proxy_steps)
    if shares:
        fitted = apply_changes(loaded, {**changes, **shares}, study)
        if _problem(fitted, target_steps) is None:
            told = {
                key: f"{share} of the run: the study's {changes[key]:,} of {proxy_steps:,} steps do not fit the "
                f"target's {target_steps:,}"
                for key, share in shares.items()
            }
            return FittedTarget(fitted, {**changes, **shares}, told)
    note = Note("schedule", f"schedule of the target: {problem}", proxy_steps, target_steps)
    return FittedTarget(target, changes, {}, (note,))


def _problem(config: RunConfig, steps: int | None) -> str | None:
    from megadit.engine.schedule import Schedule

    if steps is None:
        return None
    try:
        return Schedule.from_config(config.optim, steps).warning
    except UserError as error:
        return str(error)


def _shares(changes: Mapping[str, Any], steps: int | None) -> dict[str, str]:
    """The lengths among ``changes`` as shares of ``steps``; none where one is longer than these."""
    found: dict[str, str] = {}
    for key in _KEYS:
        length = changes.get(key)
        if not isinstance(length, int):
            continue
        if steps is None or length > steps:
            return {}
        found[key] = f"{100 * length / steps:.4f}".rstrip("0").rstrip(".") + "%"
    return found
