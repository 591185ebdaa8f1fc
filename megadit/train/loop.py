"""The training loop: batches in, optimizer steps out. What else happens in a run is a callback."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from megadit.checkpoint.format import Position
from megadit.data import Batch, BatchStream, SampleOrder
from megadit.data.windows import format_windows
from megadit.engine.deepspeed.guard import UpdateStatus
from megadit.engine.engine import StepResult
from megadit.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, say, warn_on_failure
from megadit.files.ownership import OwnershipLost
from megadit.train.callbacks import Callback, Record, RunStopped
from megadit.train.callbacks.base import due
from megadit.train.divergence import LEFT_OUT, SPIKE, TrainingDiverged, describe, remember
from megadit.train.metrics import Meter
from megadit.train.preemption import preemption_signals
from megadit.train.run import TrainingRun

_PREEMPTION_CHECK_STEPS = 10
_PASSING = (RunStopped, OwnershipLost)  # these are no failures of a callback


class RunEnd(NamedTuple):
    """How a run ended: what ``exit.json`` tells."""

    code: int
    reason: str


class Trainer:
    """Trains one run to its end, and calls its callbacks."""

    def __init__(self, run: TrainingRun, callbacks: Sequence[Callback]) -> None:
        self._run, self._callbacks = run, callbacks
        self._meter: Meter  # from the first step on
        self._last_update = UpdateStatus()  # of the last step
        self._events: list[dict[str, Any]] = []  # since the last record

    def fit(self) -> RunEnd:
        """Train from ``run.position`` to ``run.total_steps``; closes the data and the callbacks in every case.

        A run that is preempted is saved first, unless no step was made. Of a step whose loss or gradients were not
        finite it is known when the next step was made at the latest, and before anything is logged or saved of the step
        itself or of a later one: that ends the run.
        """
        run = self._run
        try:
            with self._batches() as batches, self._closing_callbacks(), preemption_signals() as stop_request:
                run.context.on_main(run.directory.check_ownership)
                for callback in self._callbacks:
                    callback.on_start(run)
                complete = run.position.step >= run.total_steps
                preempted = not complete and run.context.any(stop_request.received)
                if not preempted:  # else nothing was trained since the start, and so nothing is to be saved
                    self._meter = Meter(run, run.context.on_main(self._logged_losses))
                while not (complete or preempted):
                    log = self._is_logged(run.position.step + 1)
                    result = run.engine.train_batch(run.position.step, self._meter.clocked(batches), log)
                    self._take(result)
                    complete = run.position.step >= run.total_steps
                    preempted = not complete and self._agree_on(stop_request.received)
                    self._after_step(result, log, preempted)
                for callback in self._callbacks:
                    with warn_on_failure(_name(callback), _PASSING):
                        callback.on_end(run)
        except TrainingDiverged as error:
            if run.context.is_main:
                say(f"error: {error}")
                if error.event is not None:
                    remember(run.directory.path, error.event)
            return RunEnd(EXIT_FAILURE, f"diverged: {error}")
        except RunStopped as stop:
            return RunEnd(stop.code, stop.reason)
        if not preempted:
            return RunEnd(EXIT_OK, "complete")
        if run.context.is_main:
            saved = f"saved step {run.position.step} in {run.directory.path / 'checkpoints'}"
            if run.saved_step is None:
                saved = "before the first step: nothing to save"
            say(f"preempted: {saved}; to go on, start the same command with --resume auto")
        return RunEnd(EXIT_PREEMPTED, "preempted")

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        """The micro batches of the training set from the run's position on."""
        run, data = self._run, self._run.config.data
        stream = BatchStream(
            run.train_set,
            run.layout,
            run.config.train.seed,
            flip=data.flip,
            workers=data.workers if run.engine.reads_data else 0,  # without them nothing is read unasked
            start_step=run.position.step,
            on_corrupt=data.on_corrupt,
        )
        try:
            yield iter(stream)
        finally:
            with warn_on_failure("closing the data"):
                stream.close()

    @contextlib.contextmanager
    def _closing_callbacks(self) -> Iterator[None]:
        try:
            yield
        finally:
            for callback in self._callbacks:
                with warn_on_failure(
                    f"closing {_name(callback)}"
                ):  # nor may it take the place of the error that ended it
                    callback.close()

    def _take(self, result: StepResult) -> None:
        """Count the step that was made, unless the one before proves not to have been finite."""
        run, exhausted = self._run, result.exhausted_scale is not None
        if (
            self._last_update.skipped() and not exhausted
        ):  # the device had this step to do while the host waited for the answer
            self._diverge(self._last_update)
        self._meter.add(result.losses)
        if not exhausted:
            self._events += self._left_out(run.position.step + 1)
        samples = run.position.samples_seen + run.config.train.global_batch
        run.position = Position(run.position.step + 1, samples, run.engine.skipped_steps)
        if exhausted:
            self._diverge(UpdateStatus(), result.exhausted_scale)
        self._last_update = result.update_status

    def _agree_on(self, stop: bool) -> bool:
        """Whether some rank is to ``stop``; asked every few steps, since it waits for the device."""
        context = self._run.context
        ask = context.world_size == 1 or self._run.position.step % _PREEMPTION_CHECK_STEPS == 0
        return ask and context.any(stop)

    def _after_step(self, result: StepResult, log: bool, preempted: bool) -> None:
        """``on_step`` of all callbacks, then the log with what they added, then what must come after the log.

        Of the last of these a failure ends the run, unless it ends anyway and is saved (a preempted one is, here).
        """
        run, record = self._run, None
        # The step before a checkpoint is always logged: a window is never cut in two, and what is saved is finite.
        if log or preempted:
            if self._last_update.skipped():
                self._diverge(self._last_update)
            record = self._record(result.grad_norm)
        for callback in self._callbacks:
            addition = callback.on_step(run)
            if addition and record is not None:
                record |= addition
        if record is not None:
            run.context.on_main(run.directory.check_ownership)
            for callback in self._callbacks:
                callback.on_log(run, record)
        for callback in self._callbacks:
            over = preempted or run.saved_step == run.position.step == run.total_steps
            with warn_on_failure(_name(callback), _PASSING) if over else contextlib.nullcontext():
                callback.after_log(run)
        if preempted and run.saved_step != run.position.step:
            run.save()
        if log:
            self._meter.restart()

    def _record(self, norm: float | None) -> Record:
        """The log record of the window that ends here, with its events."""
        record = self._meter.record(norm)
        events, self._events = [*self._events, *self._spikes()], []
        return record | ({"events": events} if events else {})

    def _diverge(self, update_status: UpdateStatus, at_scale: float | None = None) -> NoReturn:
        """Log the step where the run stands, which was not finite, and raise (all ranks alike)."""
        run, clip = self._run, self._run.engine.optimizer.clip
        broken = self._meter.broken_samples()
        run.engine.optimizer.apply(run.position.step - 1)  # a later step may have been prepared since
        record = self._meter.record(math.inf) | {"grad_norms": None}
        events = [*self._events, *self._spikes()]
        order = SampleOrder(len(run.train_set), run.config.train.seed)
        error = describe(
            run.position.step, run.layout, order, broken, update_status.nonfinite_roles(), set(clip.roles), at_scale
        )
        for callback in self._callbacks:
            callback.on_divergence(run, record | {"events": [*events, error.event]})
        raise error

    def _left_out(self, step: int) -> list[dict[str, Any]]:
        """Events of the windows of samples that optimizer step ``step`` is the first to leave behind."""
        run = self._run
        windows = run.layout.newly_skipped(step - 1) if run.layout.left_out else []
        if windows and run.context.is_main:
            say(f"note: step {step} leaves out {format_windows(windows)} (train.skip_samples)")
        return [{"kind": LEFT_OUT, "step": step, "samples": [list(window)]} for window in windows]

    def _spikes(self) -> list[dict[str, Any]]:
        """Events of the steps of the last record whose loss was far above those before."""
        events = []
        for spike in self._meter.spikes:
            windows = self._run.layout.windows(spike.step - 1)
            if self._run.context.is_main:
                say(
                    f"warning: the loss at step {spike.step} is {spike.loss:.4g} after {spike.median:.4g} (median of "
                    f"{spike.count} before); the step took {format_windows(windows)}"
                )
            samples = [list(window) for window in windows]
            told = {"kind": SPIKE, "step": spike.step, "loss": spike.loss, "median": spike.median}
            events.append({**told, "samples": samples})
        return events

    def _logged_losses(self) -> list[float]:
        """Losses that the run logged before it was resumed, as far as they are finite."""
        step = self._run.position.step
        try:
            rows = self._run.directory.read_metrics() if step else []
        except (OSError, ValueError):  # torn by a kill
            return []
        return [row["loss"] for row in rows if row.get("loss") is not None and row["step"] <= step]

    def _is_logged(self, step: int) -> bool:
        """Steps that get a record: every ``log_every``, the first, and whatever validates, samples or saves.

        A checkpoint is thus known to be finite, and the clock of a window never holds the time of those three.
        """
        train = self._run.config.train
        others = (train.validate_every, train.sample_every, train.checkpoint_every)
        return step == 1 or any(due(step, every, self._run.total_steps) for every in (train.log_every, *others))


def _name(callback: Callback) -> str:
    return type(callback).__name__
