"""One pretraining run in this process, from joining the other ranks to the record of how it ended.

Everything that can be refused is refused before the model is built: configuration, layout, data, run
directory and checkpoint are checked first, in this order.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megadit.checkpoint.format import cannot_write
from megadit.checkpoint.names import saved_step
from megadit.data import ImageSet, check_images
from megadit.errors import EXIT_FAILURE, EXIT_OK, UserError, say, warn_on_failure
from megadit.files.ownership import FolderInUse, OwnershipLost, OwnershipRequest
from megadit.files.paths import check_folder
from megadit.nested import flatten
from megadit.optional import defer_compiler
from megadit.parallel import ProcessContext, start_processes, stop_processes
from megadit.parallel.consistency_check import check_consistency
from megadit.parallel.failure_messages import explain_timeout, peer_failure
from megadit.parallel.processes import RendezvousFailed
from megadit.train.callbacks import Callback, default_callbacks, make_callbacks
from megadit.train.divergence import earlier_divergence_notes
from megadit.train.loop import Trainer
from megadit.train.preemption import PreemptedAtStart
from megadit.train.prepare import StartPoint, TrainingJob, checked_start_point, total_steps
from megadit.train.run import build_run
from megadit.train.run_dir import RunDirectory

_PATIENCE_S = 10.0  # for one attempt to become the owner of the run directory
_IMAGE_CHECK_S = 5.0  # for checking image files before anything is written; others are checked as they are read
_checked: weakref.WeakSet[ImageSet] = weakref.WeakSet()  # sets that an earlier job of this process has checked


def pretrain(job: TrainingJob, callbacks: Sequence[Callback] | None = None, *, keep_group: bool = False) -> int:
    """Run the job in this process, one of WORLD_SIZE; returns the exit code.

    ``callbacks`` replaces the default ones; those of ``train.callbacks`` follow. With ``keep_group`` the process group
    stays up for the next job of this process.

    The run directory is owned before its checkpoints are read, and until the end.

    Raises:
        FolderInUse: a run that lives owns the run directory.
        OwnershipLost: another run took it over after this one had not renewed its ownership in time.
        UserError: bad input, found before any step or (a broken image) while reading.
    """
    if not job.config.train.compile:
        defer_compiler()
    with RunDirectory(job.run_dir) as directory:
        steps, code = total_steps(job.config, len(job.train_set)), EXIT_OK
        context = _join_process_group(job, directory)
        start = _acquire_run_dir(job, context, directory, steps)
        if start.step < steps:
            with _failures_recorded(job, directory, lambda: start.step):
                run = build_run(job, context, directory, steps, start)
            with _failures_recorded(job, directory, lambda: run.position.step):
                base = default_callbacks() if callbacks is None else callbacks
                code, reason = Trainer(run, [*base, *make_callbacks(*job.config.train.callbacks)]).fit()
                if context.is_main:
                    with warn_on_failure("exit.json"):
                        directory.write_exit(code, reason, run.position.step)
        if not keep_group:
            with warn_on_failure("leaving the process group"):
                stop_processes()
        return code


@contextlib.contextmanager
def _failures_recorded(job: TrainingJob, directory: RunDirectory, step: Callable[[], int]) -> Iterator[None]:
    """Record an error that ends the block in ``exit.json``, with ``step()``; a full disk becomes a UserError."""
    try:
        yield
    except PreemptedAtStart:
        raise
    except BaseException as error:
        reported = _full_disk(error, job.run_dir) or error
        code = reported.code if isinstance(reported, UserError) else EXIT_FAILURE
        explain_timeout(reported, job.config.parallel.timeout_s)
        lines = [f"{type(reported).__name__}: {reported}", *getattr(reported, "__notes__", ())]
        reason = peer_failure(reported) or " ".join(lines)
        if not isinstance(reported, OwnershipLost):
            directory.write_failure(code, reason, step())
        if reported is error:
            raise
        raise reported from error


def _join_process_group(job: TrainingJob, directory: RunDirectory) -> ProcessContext:
    """Start the process group. Where ranks are missing, the reason is recorded in ``exit.json``."""
    limits = job.config.parallel
    try:
        return start_processes(limits.timeout_s, limits.rendezvous_timeout_s)
    except UserError as error:
        directory.write_refusal(str(error), saved_step(job.run_dir))
        raise
    except RendezvousFailed as error:  # written by every rank that came: rank 0 may be the missing one
        directory.write_no_rendezvous(str(error), saved_step(job.run_dir))
        raise


def _agreed_values(job: TrainingJob) -> dict[str, Any]:
    """Values that must be equal on all ranks: the configuration, and the sizes of the data sets."""
    # Plugins are compared with the code.
    settings = {
        **flatten(job.config.model_dump(mode="json", exclude={"plugins"})),
        **flatten(job.ds_config, "ds_config."),
    }
    return {**settings, "images to train on": len(job.train_set), "images held out": len(job.val_set)}


def _full_disk(error: BaseException, run_dir: Path) -> UserError | None:
    """The error to report where a file of the run found no space on the disk; None for other errors."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return cannot_write(run_dir, error.strerror or str(error))
    return None


def _acquire_run_dir(job: TrainingJob, context: ProcessContext, directory: RunDirectory, steps: int) -> StartPoint:
    """Become the owner of the run directory and find the start point (all ranks must call). A refusal is recorded.

    Raises:
        UserError: ranks differ, the directory is another run's or cannot be written, or as ``find_start_point`` does.
    """
    try:
        check_consistency(context, _agreed_values(job))
        check_folder(job.run_dir, "--run_dir")
        ownership_request = OwnershipRequest(job.run_dir, "training")
        # The other ranks wait in a collective, which has a time limit, while rank 0 watches a silent owner.
        patience_s = min(_PATIENCE_S, job.config.parallel.timeout_s / 4)
        start: StartPoint | None = None
        while start is None:
            start = context.on_main(lambda: _prepare_directory(ownership_request, directory, job, steps, patience_s))
    except UserError as error:
        if context.is_main:
            directory.write_refusal(str(error), saved_step(job.run_dir))
        raise
    directory.token = start.token
    return start


def _prepare_directory(
    ownership_request: OwnershipRequest, directory: RunDirectory, job: TrainingJob, steps: int, patience_s: float
) -> StartPoint | None:
    """On rank 0: own the run directory, create it, and return the start point.

    None while the previous owner must be observed for longer. A run that is complete only rewrites ``exit.json``.
    """
    unwritable: UserError | None = None
    try:
        directory.ownership = ownership_request.try_acquire(patience_s)
        if directory.ownership is None:
            return None
        directory.token = directory.ownership.token
    except FolderInUse:
        raise
    except UserError as error:  # no obstacle if the run is complete
        unwritable = error
    start = checked_start_point(job, steps)
    if start.step >= steps:
        say(
            f"{job.run_dir}: already trained to step {start.step} of {steps}; raise train.steps, "
            "or choose another --run_dir"
        )
        with contextlib.suppress(OSError):  # nothing else is written, so a read-only run directory is no obstacle
            directory.write_exit(EXIT_OK, "complete", start.step)
        return start
    if directory.ownership is None:
        assert unwritable is not None
        raise unwritable
    of_checkpoint = {start.checkpoint.parent.parent} if start.checkpoint is not None else set()
    for note in earlier_divergence_notes({job.run_dir, *of_checkpoint}, start.next_sample, start.left_out):
        say(f"warning: {note}")
    for images in (job.train_set, job.val_set):
        if images not in _checked:
            check_images(images, seconds=_IMAGE_CHECK_S)
            _checked.add(images)
    directory.create()
    return replace(start, token=directory.token)
