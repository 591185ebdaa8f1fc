"""``launch/pretrain.py --dry_run``: checks and the plan of a run, for the ranks started here or for any number."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megadit.config import LoadedConfig, RunConfig
from megadit.engine.deepspeed.check import check_ds_config
from megadit.errors import EXIT_OK, UserError
from megadit.optional import defer_compiler
from megadit.parallel.environment import is_local_main
from megadit.train.prepare import (
    StartPoint,
    TrainingJob,
    check_data,
    check_local_files,
    check_requirements,
    checked_start_point,
    resolve_config,
    total_steps,
)


def dry_run(job: TrainingJob, *, as_json: bool = False, full: bool = False) -> int:
    """Print the layout, its memory and messages, and the muP table (``full``: of every parameter); train nothing.

    Raises:
        UserError: the checkpoint to resume from, or an image, is broken, or the data differ from the checkpoint's.
    """
    if not is_local_main():
        return EXIT_OK
    steps = total_steps(job.config, len(job.train_set))
    start = checked_start_point(job, steps, dry=True)
    _warn_about_machine(job)
    from megadit.data import check_images

    for images in (job.train_set, job.val_set):
        check_images(images)
    lines = [
        f"data         {job.train_set.name}: {len(job.train_set)} images to train on, {len(job.val_set)} held out",
        f"run_dir      {job.run_dir}{_start_text(start)}",
    ]
    _print_report(job.config, job.ds_config, int(os.environ["WORLD_SIZE"]), steps, lines, as_json, full)
    return EXIT_OK


def dry_run_for_ranks(
    loaded: LoadedConfig,
    ds_config: str | None,
    folder: Path,
    resume: str,
    world_size: int,
    *,
    as_json: bool = False,
    full: bool = False,
) -> int:
    """``dry_run`` for ``world_size`` ranks of other machines: what is missing on this one is a warning.

    Raises:
        UserError: anything in configuration or layout that cannot work.
    """
    merged = resolve_config(loaded, ds_config, world_size)
    check_ds_config(merged.ds_config, dry=True)
    lines, steps = [f"run_dir      {folder}"], merged.config.train.steps
    try:
        check_local_files(merged.config, folder, resume)
        job = check_data(merged, folder, resume)
        steps = total_steps(job.config, len(job.train_set))
        lines = [f"run_dir      {folder}{_start_text(checked_start_point(job, steps, dry=True))}"]
        _warn_about_machine(job)
    except UserError as error:
        _warn(error)
    _print_report(merged.config, merged.ds_config, world_size, steps, lines, as_json, full)
    return EXIT_OK


def _print_report(
    config: RunConfig,
    ds_config: dict[str, Any],
    ranks: int,
    steps: int | None,
    lines: list[str],
    as_json: bool,
    full: bool,
) -> None:
    from megadit.models import build_model
    from megadit.mup.table import by_role, format_rows, rows
    from megadit.plan import describe_plan

    if not config.train.compile:
        defer_compiler()
    model = build_model(config.model, device="meta")
    text, facts = describe_plan(config, model, steps, ranks, ds_config)
    if as_json:
        print(json.dumps(facts))
        return
    table = rows(model, config.optim)
    print("\n".join([text, *lines, "", format_rows(table if full else by_role(table))]))


def _warn_about_machine(job: TrainingJob) -> None:
    try:
        check_requirements(job)
    except UserError as error:
        _warn(error)


def _warn(error: UserError) -> None:
    print(f"warning: on this machine the run would be refused: {error}", file=sys.stderr)


def _start_text(start: StartPoint) -> str:
    if start.checkpoint is not None:
        return f", resuming at step {start.step} ({start.checkpoint})"
    return f", starting from the weights of {start.weights_from}" if start.weights_from is not None else ""
