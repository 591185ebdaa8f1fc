"""A process of the pretrain command, between its arguments and the training: check everything, report or train.

What can be refused without torch is refused before it is imported, and DeepSpeed is imported to train alone; so this
module's own imports are light, and the functions import what is heavy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadit.checkpoint.names import saved_step
from megadit.config import LoadedConfig, load
from megadit.errors import EXIT_BAD_INPUT, EXIT_FAILURE, UserError
from megadit.files.ownership import refuse_folder_in_use
from megadit.files.paths import check_folder
from megadit.parallel import prepare_environment
from megadit.parallel.environment import is_local_main
from megadit.parallel.failure_messages import explain_timeout, peer_failure, summary, write_torchelastic_error
from megadit.parallel.launcher import exit_with_launcher
from megadit.parallel.processes import RendezvousFailed
from megadit.plugins import load_plugins
from megadit.streams import result_is_saved
from megadit.train.prepare import TrainingJob, check_job, check_requirements, run_folder
from megadit.train.run_dir import RunDirectory, refuse_foreign

_ONE_START_S = 60.0  # within which ranks that meet the same error are those of one start


def run(
    config: str | None,
    overrides: Sequence[str],
    ds_config: str | None,
    run_dir: str | None,
    resume: str,
    dry: bool,
    *,
    world_size: int | None = None,
    as_json: bool = False,
    full: bool = False,
    plugins: Sequence[str] = (),
) -> int:
    """Run ``launch/pretrain.py`` with these arguments; returns the exit code.

    Raises:
        UserError: refused, on the one rank that reports it for its host.
    """
    for option, present in (("--world_size", world_size is not None), ("--json", as_json), ("--full", full)):
        if present and not dry:
            raise UserError(f"{option}: belongs to --dry_run; add that, or leave it out")
    if full and as_json:
        raise UserError(
            "--full: is for the printed table, and --json prints the layout alone; leave one of the two out"
        )
    folder = run_folder(config, run_dir)
    _prepare_process(folder, dry)
    if world_size is not None:
        if world_size < 1:
            raise UserError(f"--world_size: {world_size} is no number of ranks; give 1 or more")
        from megadit.train.dry_run import dry_run_for_ranks

        loaded = _load(config, overrides, plugins)
        return dry_run_for_ranks(loaded, ds_config, folder, resume, world_size, as_json=as_json, full=full)
    try:
        check_folder(folder, "--run_dir")
        refuse_foreign(folder)
        if not dry and os.environ["WORLD_SIZE"] == "1":  # of several ranks only some may see the owner's process
            refuse_folder_in_use(folder, "--run_dir")
        job = check_job(_load(config, overrides, plugins), ds_config, folder, resume, dry=dry)
        if dry:
            from megadit.train.dry_run import dry_run

            return dry_run(job, as_json=as_json, full=full)
        check_requirements(job)
    except UserError as error:
        directory = RunDirectory(folder)
        # One of the ranks alone may meet it; thousands that do write it once or a few times.
        if not dry and (os.environ["RANK"] == "0" or not directory.recorded_since(time.time() - _ONE_START_S)):
            directory.write_refusal(str(error), saved_step(directory.path))
        write_torchelastic_error(f"error: {error}")
        if is_local_main():
            raise
        return EXIT_BAD_INPUT  # every rank of the host met the same error; one reports it
    from megadit.train.pretrain import pretrain

    result_is_saved()
    with _report_errors(job) as end:
        end.code = pretrain(job)
    return end.code


def _load(config: str | None, overrides: Sequence[str], plugins: Sequence[str]) -> LoadedConfig:
    """The configuration, after the plugins that the command line and ``--config`` name. Raises UserError."""
    load_plugins(plugins)
    return load(config, overrides, may_import=True)


def _prepare_process(folder: Path, dry: bool) -> None:
    """Complete the rank variables, end with the launcher when it ends, and note GPUs that one process leaves unused.

    Raises:
        UserError: the launcher's variables are invalid; on every rank, since none knows which is the first.
    """
    try:
        ranks = prepare_environment()
    except UserError as error:
        if not dry:
            RunDirectory(folder).write_refusal(str(error), saved_step(folder))
        write_torchelastic_error(f"error: {error}")
        raise
    exit_with_launcher(ranks)
    if ranks.note:
        print(f"note: {ranks.note}", file=sys.stderr)


@dataclass
class _ExitCode:
    code: int = EXIT_FAILURE


@contextlib.contextmanager
def _report_errors(job: TrainingJob) -> Iterator[_ExitCode]:
    """Report an error of the training: in full with its rank where it was met first, in one line on the other ranks."""
    end, rank = _ExitCode(), os.environ["RANK"]
    try:
        yield end
    except UserError as error:
        write_torchelastic_error(f"error: {error}")
        where = "" if os.environ["WORLD_SIZE"] == "1" or error.everywhere else f"[rank {rank}] "
        if not error.everywhere or rank == "0":
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        end.code = error.code
    except RendezvousFailed as error:
        write_torchelastic_error(f"error: {error}")
        if is_local_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
    except Exception as error:
        message = peer_failure(error)
        if message is None:
            explain_timeout(error, job.config.parallel.timeout_s)
            write_torchelastic_error(summary(error))
            raise
        print(f"[rank {rank}] {message}", file=sys.stderr, flush=True)
