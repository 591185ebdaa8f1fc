"""The target's configuration and its file: the target as it was, with the study's base hyperparameters laid over it.

Warm-up and decay that the study found in steps and that do not fit the target's run become shares of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadit import __version__
from megadit.config import LoadedConfig, RunConfig, load_config, replace
from megadit.config.loading.sources import OVERRIDES
from megadit.config.schema.reads import is_read
from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.yaml_text import dump_yaml
from megadit.nested import flatten, unflatten
from megadit.search.apply.cost import run_steps
from megadit.search.apply.untransferred import Caveat

_MARK = "# Written by megadit"
_LENGTHS = ("optim.warmup_steps", "optim.decay_steps")
# What gives base hyperparameters their meaning, beside the searched ones: they go with them.
_PARAMETRIZATION = (
    "model.base_width",
    "model.output_mult",
    "model.init",
    "model.adaln_init",
    "model.role_hps",
    "optim.eps_mode",
    "optim.wd_mode",
    "optim.wd_vectors",
)


def base_changes(proxy: RunConfig, target: RunConfig, hps: Mapping[str, Any]) -> dict[str, Any]:
    """What the target takes from the study's run ``proxy``, by dotted key: ``hps``, and what gives them their meaning.

    Of the latter (base width, readout and role multipliers, init, rules of decay and epsilon) only what differs and
    what the target reads.
    """
    ours, theirs = flatten(proxy.model_dump()), flatten(target.model_dump())
    shared = [key for key in ours if key.startswith(tuple(f"{name}." for name in _PARAMETRIZATION))]
    carried = {key: ours[key] for key in (*_PARAMETRIZATION, *shared) if key in ours and ours[key] != theirs.get(key)}
    carried = {**carried, **hps}
    return {**hps, **{key: carried[key] for key in carried if key not in hps and is_read(key, {**theirs, **carried})}}


@dataclass(frozen=True)
class FittedTarget:
    """The target with ``changes`` laid over it; ``lengths``: optimizer steps of proxy and target, None where not known.

    scaled: of each key that became a share, what is to be told.  notes: how its schedule still does not fit its run.
    """

    config: RunConfig
    changes: dict[str, Any]
    lengths: tuple[int | None, int | None]
    scaled: dict[str, str] = field(default_factory=dict)
    caveats: tuple[Caveat, ...] = ()


def fit_target(loaded: LoadedConfig, changes: dict[str, Any], study: str, proxy_steps: int | None) -> FittedTarget:
    """``loaded`` with ``changes``; where its schedule does not fit its run, lengths among them become the shares that
    they were of the proxy's run, of ``proxy_steps`` steps.

    Raises:
        UserError: the target refuses a value, or an override on the command line sets one of the keys otherwise.
    """
    target = _changed(loaded, changes, study)
    lengths = proxy_steps, target_steps = proxy_steps, run_steps(target)
    if target_steps is None or (problem := _schedule_problem(target, target_steps)) is None:
        return FittedTarget(target, changes, lengths)
    if shares := _as_shares(changes, proxy_steps):
        fitted = _changed(loaded, {**changes, **shares}, study)
        if _schedule_problem(fitted, target_steps) is None:
            reasons = {
                key: f"{share} of the run: the study's {changes[key]:,} of {proxy_steps:,} steps do not fit the "
                f"target's {target_steps:,}"
                for key, share in shares.items()
            }
            return FittedTarget(fitted, {**changes, **shares}, lengths, reasons)
    caveat = Caveat("schedule", f"schedule of the target: {problem}", *lengths)
    return FittedTarget(target, changes, lengths, caveats=(caveat,))


def _changed(target: LoadedConfig, changes: Mapping[str, Any], study: str) -> RunConfig:
    values = flatten(target.config.model_dump())
    for key, value in changes.items():
        if target.user_set.get(key) == OVERRIDES and values.get(key) != value:
            raise UserError(f"{key}: the override {values.get(key)} is not what study {study} found, {value}; drop it")
    return replace(target.config, changes, f"study {study}")


def _schedule_problem(config: RunConfig, steps: int) -> str | None:
    from megadit.engine.schedule import Schedule

    try:
        return Schedule.from_config(config.optim, steps).warning
    except UserError as error:
        return str(error)


def _as_shares(changes: Mapping[str, Any], steps: int | None) -> dict[str, str]:
    """The lengths among ``changes`` as shares of ``steps``; none where one is longer than these."""
    lengths = {key: changes[key] for key in _LENGTHS if isinstance(changes.get(key), int)}
    if steps is None or any(length > steps for length in lengths.values()):
        return {}
    return {key: f"{100 * length / steps:.4f}".rstrip("0").rstrip(".") + "%" for key, length in lengths.items()}


def write_target(
    path: Path, base: Path, overrides: Mapping[str, Any], fitted: FittedTarget, header: Sequence[str]
) -> None:
    """Write a YAML file that inherits from ``base`` and holds ``overrides`` (nested) and the target's changes alone.

    It appears whole or not at all, after it was loaded and found to give ``fitted``. ``header``: lines of comment.

    Raises:
        UserError: the folder cannot be written, or ``path`` is a file that this function did not write.
    """
    _check_free(path)
    link = os.path.relpath(base.resolve(), path.parent.resolve())
    values = unflatten({**flatten(overrides), **fitted.changes})
    comment = "".join(f"# {' '.join(line.split())}\n" for line in header)
    mark = f"{_MARK} {__version__} (tools/transfer.py apply): base hyperparameters found on a proxy.\n"
    text = mark + comment + dump_yaml({"base": link, **values})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            if load_config(temporary) != fitted.config:
                raise RuntimeError(f"{path} would not give the configuration that was checked:\n{text}")
    except OSError as error:
        raise UserError(f"--out: '{path}' cannot be written ({error.strerror}); choose another file") from None


def _check_free(path: Path) -> None:
    """An earlier target of ours may be replaced, a file that a person wrote may not."""
    if path.is_dir():
        raise UserError(f"--out: '{path}' is a folder; name a .yaml file in it")
    try:
        mine = not path.exists() or path.read_text(encoding="utf-8", errors="replace").startswith(_MARK)
    except OSError as error:
        raise UserError(f"--out: '{path}' cannot be read ({error.strerror}); choose another file") from None
    if not mine:
        raise UserError(f"--out: '{path}' exists and was not written by apply; choose another file")
