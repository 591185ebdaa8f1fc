"""A worker: one process (or several ranks under torchrun or srun) that runs a study's trials one after another.

``python -m megadit.search.workers.worker STUDY_DIR [PLUGIN ...]`` is what ``launch/sweep.py run`` starts. A trial that
fails for a reason that is not the user's ends the worker: its process may be beyond repair, as a GPU's after an error
is, and a new one is cheap.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.errors import EXIT_OK, EXIT_PREEMPTED, run_command, say
from megadit.parallel.environment import prepare_environment
from megadit.parallel.launcher import exit_with_launcher, set_parent_death_signal
from megadit.plugins import load_plugins
from megadit.search.storage.identity import this_worker
from megadit.search.study.study import Study, load_study
from megadit.search.wording import point_text
from megadit.train.preemption import signal_handlers, stop_handling_signals

if TYPE_CHECKING:
    from megadit.parallel import ProcessContext
    from megadit.search.storage.records import TrialAttempt

STOP = "stop"  # the flag file of a study directory; its text says whether running trials end too
NOW, AFTER = "now", "after the running trial"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_POLL_S = 1.0
_WAIT_S = 60.0  # rank 0 lets the waiting ranks go on so often, so that their collective does not time out
_FLAG_S = 1.0  # how old what was read from the flag file may be
_MAX_BEAT_S = 10.0
_CACHED_SETS = 2


def request_stop(study: Study, now: bool) -> None:
    """Ask all workers of a study, on whatever host, to end: after their running trial or, with ``now``, at once."""
    (study.folder / STOP).write_text(f"{NOW if now else AFTER}\n", encoding="utf-8")


class StopSignal:
    """Whether the worker is to end: by a signal, the study's flag, or because it lost its trial."""

    def __init__(self, study: Study) -> None:
        self._flag = study.folder / STOP
        self._flag_read_at = 0.0
        self._flag_text = ""
        self.signalled = False

    def on_signal(self, number: int, *_: Any) -> None:
        """Handle a signal; a second one ends the process at once."""
        if self.signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signalled = True

    @property
    def before_next(self) -> bool:
        """Whether to take no further trial."""
        return self.signalled or bool(self._read())

    @property
    def now(self) -> bool:
        """Whether to give the running trial back."""
        return self.signalled or self._read() == NOW

    def _read(self) -> str:
        if time.monotonic() - self._flag_read_at > _FLAG_S:
            self._flag_read_at, self._flag_text = time.monotonic(), ""
            with contextlib.suppress(OSError):
                self._flag_text = self._flag.read_text(encoding="utf-8").strip() or AFTER
        return self._flag_text


class Worker:
    """The loop of one worker. Rank 0 alone uses the store; what it decides, all ranks do."""

    def __init__(self, study: Study, context: ProcessContext, stop: StopSignal, began: float) -> None:
        # Imported before a trial is claimed: an installation that is broken costs no trial an attempt.
        from megadit.data import build_datasets
        from megadit.search.workers import trial

        self._trial = trial
        self.study, self.context, self.stop = study, context, stop
        self._began = began  # of the work for the next trial
        self._id = this_worker()
        self._store: Any = None  # on rank 0
        self._ownership_checked_at = 0.0
        self._datasets = functools.lru_cache(maxsize=_CACHED_SETS)(build_datasets)

    def run(self) -> int:
        """Run trials until none is left (0) or the worker is to stop (85)."""
        with contextlib.ExitStack() as stack:
            self.context.on_main(lambda: self._join(stack))
            while True:
                code, claim = self.context.on_main(self._next)
                if code is not None:
                    return int(code)
                if claim is not None:
                    self._run(claim)

    def _join(self, stack: contextlib.ExitStack) -> None:
        from megadit.search.storage.store import StudyStore

        self._store = StudyStore.join(self.study)
        self._store.refuse_other_hosts()
        every = min(_MAX_BEAT_S, self.study.spec.stale_after_s / 4)
        stack.enter_context(self._store.heartbeats.beating(self._id, every))
        _log(f"worker {self._id.label} joins study {self.study.spec.name} in {self.study.folder}")

    def _next(self) -> tuple[int | None, TrialAttempt | None]:
        """On rank 0: the worker's exit code or the trial that it claimed; neither while others run the last trials."""
        folder = self.study.folder
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            if self.stop.signalled:
                _log(f"stopped; the study in {folder} goes on with the next run or worker")
                return EXIT_PREEMPTED, None
            if self.stop.before_next:
                remedy = f"the next run goes on, as do workers once {folder / STOP} is removed"
                _log(f"stopped by launch/sweep.py stop; {remedy}")
                return EXIT_PREEMPTED, None
            claim = self._store.claim(self._id)
            if claim is not None:
                return None, claim
            if self._store.results().complete:
                _log(f"no trial is left; the study, for launch/sweep.py report: {folder}")
                return EXIT_OK, None
            self._began = time.monotonic() + _POLL_S  # waiting for others is no trial's overhead
            time.sleep(_POLL_S)
        return None, None

    def _run(self, claim: TrialAttempt) -> None:
        if self.context.is_main:
            _log(f"trial {claim.number} begins: {describe(claim)}")
        hooks = self._trial.TrialHooks(
            lambda: self._should_stop(claim), lambda step, loss: self._store.report(claim, step, loss)
        )
        try:
            result = self._trial.run_trial(self.study, claim, self.context, self._datasets, hooks, self._began)
        except Exception as error:
            traceback.print_exc()
            if self.context.is_main:
                self._store.release(claim, self._id, f"{type(error).__name__}: {error}", counts=True)
            raise
        self._began = time.monotonic()
        if not self.context.is_main:
            return
        if result is None:
            if self._store.owns(claim, self._id) and not self.stop.now:
                self.stop.signalled = True  # by SIGUSR1, which training takes for itself
            self._store.release(claim, self._id, "interrupted", counts=False)
            _log(f"trial {claim.number} is given back")
        elif self._store.finish(claim, result, self._id):
            shown = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items() if value is not None)
            _log(f"trial {claim.number} {result.outcome}: {shown or result.reason} ({result.seconds:.1f} s)")
        else:
            _log(f"trial {claim.number} had been given to another worker; its result is dropped")

    def _should_stop(self, claim: TrialAttempt) -> bool:
        """Called at every logged step: the worker is to end or (looked up now and then) the trial is another's."""
        if self.stop.now:
            return True
        if time.monotonic() - self._ownership_checked_at < self.study.spec.stale_after_s / 4:
            return False
        self._ownership_checked_at = time.monotonic()
        return not self._store.owns(claim, self._id)


def describe(claim: TrialAttempt) -> str:
    """A claim in words: variant, scale, hyperparameters, seed and, after a lost attempt, the attempt's number."""
    scale = "" if claim.scale is None else f"scale {claim.scale}"
    attempt = f"attempt {claim.attempt}" if claim.attempt > 1 else ""
    return ", ".join(filter(None, (claim.variant, scale, point_text(claim.hps), f"seed {claim.seed}", attempt)))


def _log(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {text}")


def work(study: Study) -> int:
    """Run trials of the study, which must have been created, in this process (one of WORLD_SIZE).

    Returns 0 when every trial has ended, and 85 when it was stopped, by a signal or the flag, while some are left.

    Raises:
        UserError: the study cannot be joined.
    """
    from megadit.parallel import start_processes, stop_processes
    from megadit.search.workers.scores import COMMAND_TIMEOUT_S

    began, stop = time.monotonic(), StopSignal(study)
    stop_handling_signals()
    with signal_handlers(_SIGNALS, stop.on_signal):
        # Other ranks wait in a collective while rank 0 runs a score's command.
        context = start_processes(COMMAND_TIMEOUT_S + 600) if study.spec.has_commands else start_processes()
        code = Worker(study, context, stop, began).run()
        stop_processes()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Work on the study in the folder named, with the plugins named after it.

    Also under torchrun, which takes any code but 0 for a crash.
    """
    ranks = prepare_environment()
    if not exit_with_launcher(ranks):  # this is no rank of torchrun's, and `run` itself is the parent
        set_parent_death_signal()
    folder, *plugins = sys.argv[1:] if argv is None else argv
    load_plugins(plugins)
    code = work(load_study(Path(folder)))
    return EXIT_OK if ranks.world_size != 1 else code


if __name__ == "__main__":
    run_command(main)
