"""One claimed trial: an ordinary run in its own directory, and the result that is made of it.

Trials of a worker share its process: data sets are read once, the process group stays up, and what a run leaves behind
is collected before the next one starts.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.checkpoint.find import find_checkpoint
from megadit.checkpoint.names import checkpoint_root
from megadit.config import LoadedConfig
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError
from megadit.files.json_text import parse_json
from megadit.files.ownership import FolderInUse, OwnershipLost
from megadit.models import count_parameters
from megadit.parallel import ProcessContext
from megadit.plan import training_flops
from megadit.search.results import COMPLETE, DIVERGED, FAILED, PRUNED, TrialResult
from megadit.search.storage.records import TrialAttempt
from megadit.search.study.study import Study
from megadit.search.workers import scores
from megadit.train.callbacks import Callback, Record, RunStopped, make_callbacks
from megadit.train.prepare import TrainingJob, check_job, check_requirements, total_steps
from megadit.train.pretrain import pretrain
from megadit.train.run_dir import RunDirectory

if TYPE_CHECKING:
    from megadit.train.prepare import Datasets
    from megadit.train.run import TrainingRun

_PRUNED, _STOPPED = "pruned", "stopped"


@dataclass(frozen=True)
class TrialHooks:
    """Called on rank 0 at every logged step: is the worker to stop, and (step, loss) is the trial to be pruned."""

    should_stop: Callable[[], bool]
    should_prune: Callable[[int, float], bool]


class TrialCallback(Callback):
    """Ends a trial early when a hook says so, and measures the time spent in training."""

    def __init__(self, study: Study, hooks: TrialHooks) -> None:
        self._pruning = study.spec.pruning
        self._hooks = hooks
        self._rows: list[Record] = []
        self._begin: float | None = None
        self.training_s = 0.0
        self.step = 0
        self.ended: str | None = None

    def on_start(self, run: TrainingRun) -> None:
        """Begin the clock; a resumed trial has rows already."""
        self._begin, self.step = time.monotonic(), run.position.step
        if run.context.is_main:
            self._rows = [row for row in run.directory.read_metrics() if row["step"] <= self.step]

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """Decide on rank 0, for all. A trial that keeps checkpoints saves one before it is interrupted."""
        self._rows.append(record)
        self.ended = run.context.on_main(lambda: self._early_end(record["step"], run.total_steps))
        if self.ended == _STOPPED:
            if run.config.train.checkpoint_every is not None:
                run.save()
            raise RunStopped(EXIT_PREEMPTED, "stopped with its worker")
        if self.ended == _PRUNED:
            raise RunStopped(EXIT_OK, f"pruned at step {record['step']}")

    def after_log(self, run: TrainingRun) -> None:
        """Count the step."""
        self.step = run.position.step

    def close(self) -> None:
        """End the clock."""
        if self._begin is not None:
            self.training_s, self._begin = time.monotonic() - self._begin, None

    def _early_end(self, step: int, total: int) -> str | None:
        """Whether the trial ends at ``step`` of ``total``: stopped with its worker, pruned, or not."""
        if step >= total:
            return None
        if self._hooks.should_stop():
            return _STOPPED
        rule = self._pruning
        if rule.rule != "none" and step >= rule.after and step % rule.every == 0:
            loss = scores.train_loss(self._rows, step, rule.every)
            if loss is not None and self._hooks.should_prune(step, loss):
                return _PRUNED
        return None


def run_trial(
    study: Study, claim: TrialAttempt, context: ProcessContext, datasets: Datasets, hooks: TrialHooks, began: float
) -> TrialResult | None:
    """Train the claimed trial on all ranks and give its result on rank 0 (its own on the others means nothing).

    None when it was interrupted. ``began`` (``time.monotonic()``) is when work for this trial began. Bad input in a
    trial is a result, not an error of the study.
    """
    folder = study.trial_folder(claim.number)
    cell = next(cell for cell in study.cells if (cell.variant, cell.scale) == (claim.variant, claim.scale))
    callback = TrialCallback(study, hooks)
    job, refusal, code = None, "", EXIT_OK
    try:
        config = study.config(cell, claim.hps, claim.seed)
        job = check_job(LoadedConfig(config, source=f"trial {claim.number}"), None, folder, "auto", datasets)
        check_requirements(job)
        context.on_main(lambda: _make_room(folder))
        code = pretrain(job, _callbacks(study, callback), keep_group=True)
    except (FolderInUse, OwnershipLost):
        raise  # no result of this trial: its folder is another process's
    except UserError as error:
        if job is not None and context.world_size > 1 and not error.everywhere:
            raise  # the other ranks are in the middle of a step: the launcher ends them all
        refusal = str(error)
    finally:
        _collect()
    if code == EXIT_PREEMPTED:
        return None
    result = TrialResult.failed(study, vars(claim), refusal, claim.attempt)
    if not context.is_main:
        return result
    if job is not None and not refusal:
        result = _scored(result, study, job, callback, code)
    _tidy(study, folder)
    seconds = time.monotonic() - began
    return replace(result, seconds=round(seconds, 3), overhead_s=round(seconds - callback.training_s, 3))


def _make_room(folder: Path) -> None:
    """Remove what an attempt left from which no run can resume: a folder without a checkpoint."""
    if folder.exists() and find_checkpoint(folder) is None:
        shutil.rmtree(folder)


def _callbacks(study: Study, callback: TrialCallback) -> list[Callback]:
    """Metrics always; of the rest what the study keeps, or a command that scores the run needs."""
    keep = study.spec.keep
    optional = {
        "checkpoints": "checkpoint" in keep or study.spec.has_commands,
        "samples": "samples" in keep,
        "tensorboard": "tensorboard" in keep,
        "summary": "curves" in keep,
    }
    return [*make_callbacks("validation", "json-lines"), callback, *make_callbacks(*filter(optional.get, optional))]


def _collect() -> None:
    """Free what the run held before the next one is built: engines refer to themselves."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _scored(result: TrialResult, study: Study, job: TrainingJob, callback: TrialCallback, code: int) -> TrialResult:
    """``result`` with the outcome and scores of a run that ended by itself or was pruned."""
    config, spec = job.config, study.spec
    rows = RunDirectory(job.run_dir).read_metrics()
    total = total_steps(config, len(job.train_set))
    steps = max(callback.step, rows[-1]["step"] if rows else 0)
    last = next((score.last for score in spec.scores if score.kind == "train_loss"), 1)
    values, horizons = result.scores, {}
    if callback.ended == _PRUNED:
        outcome, reason = PRUNED, f"pruned at step {steps} of {total} by rule {spec.pruning.rule}"
    else:
        for step in study.horizons:
            diverged = scores.divergence(rows, step, spec.diverged_above, last)
            horizons[step] = result.scores if diverged else scores.metric_scores(rows, step, spec.scores)
        reason = scores.divergence(rows, total, spec.diverged_above, last) or ""
        if code == EXIT_FAILURE:
            reason = _why_diverged(job.run_dir)
        outcome = DIVERGED if reason or code == EXIT_FAILURE else COMPLETE
        if outcome == COMPLETE:
            values = scores.metric_scores(rows, total, spec.scores)
            try:
                for score in spec.scores:
                    if score.kind == "command":
                        values[score.name] = scores.command_score(score, job.run_dir)
            except UserError as error:
                outcome, reason = FAILED, str(error)
    return replace(
        result,
        reason=reason,
        outcome=outcome,
        scores=values,
        horizons=horizons,
        steps=steps,
        global_batch=config.train.global_batch,
        parameters=count_parameters(config.model, fixed=False),
        flops=training_flops(config, steps),
    )


def _why_diverged(run_dir: Path) -> str:
    """What ``exit.json`` says, if there was space for it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(parse_json((run_dir / "exit.json").read_bytes())["reason"]).removeprefix("diverged: ")
    return "its loss is no finite number"


def _tidy(study: Study, folder: Path) -> None:
    """Remove what the study does not keep."""
    if "checkpoint" not in study.spec.keep:
        shutil.rmtree(checkpoint_root(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / "samples").rmdir()  # if it is empty
