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
from megadit.train.divergence import LEFT_OUT, SPIKE, TrainingDiverged, divergence_error, record_event
from megadit.train.metrics import Meter
from megadit.train.preemption import preemption_signals
from megadit.train.run import TrainingRun

_PREEMPTION_CHECK_STEPS = 10
_NOT_SUPPRESSED = (RunStopped, OwnershipLost)  # end the run, wherever a callback raises them


class RunEnd(NamedTuple):
    """How a run ended: the exit code and reason in ``exit.json``."""

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

        A preempted run is saved first, unless no step was made. A step whose loss or gradients were not finite ends the
        run. It is detected one step later at the latest, and before that step or a later one is logged or saved.
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
                    result = run.engine.train_batch(run.position.step, self._meter.timed(batches), log)
                    self._count_step(result)
                    complete = run.position.step >= run.total_steps
                    preempted = not complete and self._any_rank(stop_request.received)
                    self._after_step(result, log, preempted)
                for callback in self._callbacks:
                    with warn_on_failure(_class_name(callback), _NOT_SUPPRESSED):
                        callback.on_end(run)
        except TrainingDiverged as error:
            if run.context.is_main:
                say(f"error: {error}")
                if error.event is not None:
                    record_event(run.directory.path, error.event)
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
                    f"closing {_class_name(callback)}"
                ):  # nor may it replace the error that ended the run
                    callback.close()

    def _count_step(self, result: StepResult) -> None:
        """Count the step just made, unless the one before it was not finite."""
        run, exhausted = self._run, result.exhausted_scale is not None
        if self._last_update.skipped() and not exhausted:  # read only now, while the device computes this step
            self._diverge(self._last_update)
        self._meter.add(result.losses)
        if not exhausted:
            self._events += self._skipped_sample_events(run.position.step + 1)
        samples = run.position.samples_seen + run.config.train.global_batch
        run.position = Position(run.position.step + 1, samples, run.engine.skipped_steps)
        if exhausted:
            self._diverge(UpdateStatus(), result.exhausted_scale)
        self._last_update = result.update_status

    def _any_rank(self, stop: bool) -> bool:
        """Whether any rank is to ``stop``; reduced every few steps only, since that waits for the device."""
        context = self._run.context
        due_now = context.world_size == 1 or self._run.position.step % _PREEMPTION_CHECK_STEPS == 0
        return due_now and context.any(stop)

    def _after_step(self, result: StepResult, log: bool, preempted: bool) -> None:
        """``on_step`` of all callbacks, then ``on_log`` with what they added, then ``after_log``.

        A failure in ``after_log`` ends the run, unless it ends anyway and is saved (a preempted one is, here).
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
            finished = preempted or run.saved_step == run.position.step == run.total_steps
            with warn_on_failure(_class_name(callback), _NOT_SUPPRESSED) if finished else contextlib.nullcontext():
                callback.after_log(run)
        if preempted and run.saved_step != run.position.step:
            run.save()
        if log:
            self._meter.restart()

    def _record(self, norm: float | None) -> Record:
        """The log record of the window that ends here, with its events."""
        record = self._meter.record(norm)
        events, self._events = [*self._events, *self._spike_events()], []
        return record | ({"events": events} if events else {})

    def _diverge(self, update_status: UpdateStatus, at_scale: float | None = None) -> NoReturn:
        """Log the current step, which was not finite, and raise TrainingDiverged (on all ranks)."""
        run, clip = self._run, self._run.engine.optimizer.clip
        broken = self._meter.broken_samples()
        run.engine.optimizer.apply(run.position.step - 1)  # a later step may have been prepared since
        record = self._meter.record(math.inf) | {"grad_norms": None}
        events = [*self._events, *self._spike_events()]
        order = SampleOrder(len(run.train_set), run.config.train.seed)
        error = divergence_error(
            run.position.step, run.layout, order, broken, update_status.nonfinite_roles(), set(clip.roles), at_scale
        )
        for callback in self._callbacks:
            callback.on_divergence(run, record | {"events": [*events, error.event]})
        raise error

    def _skipped_sample_events(self, step: int) -> list[dict[str, Any]]:
        """Events for the windows of samples that optimizer step ``step`` skips (``train.skip_samples``)."""
        run = self._run
        windows = run.layout.newly_skipped(step - 1) if run.layout.left_out else []
        if windows and run.context.is_main:
            say(f"note: step {step} skips {format_windows(windows)} (train.skip_samples)")
        return [{"kind": LEFT_OUT, "step": step, "samples": [list(window)]} for window in windows]

    def _spike_events(self) -> list[dict[str, Any]]:
        """Events for the loss spikes in the window of the last record."""
        events = []
        for spike in self._meter.spikes:
            windows = self._run.layout.windows(spike.step - 1)
            if self._run.context.is_main:
                say(
                    f"warning: loss spike at step {spike.step}: {spike.loss:.4g}, after a median of {spike.median:.4g} "
                    f"over {spike.count} steps; the step took {format_windows(windows)}"
                )
            samples = [list(window) for window in windows]
            event = {"kind": SPIKE, "step": spike.step, "loss": spike.loss, "median": spike.median}
            events.append({**event, "samples": samples})
        return events

    def _logged_losses(self) -> list[float]:
        """The finite losses that the run logged before it was resumed."""
        step = self._run.position.step
        try:
            rows = self._run.directory.read_metrics() if step else []
        except (OSError, ValueError):  # torn by a kill
            return []
        return [row["loss"] for row in rows if row.get("loss") is not None and row["step"] <= step]

    def _is_logged(self, step: int) -> bool:
        """Whether ``step`` gets a record: the first, every ``log_every``, and each that validates, samples or saves.

        So a checkpoint is known to be finite, and the time of a window never includes those three.
        """
        train = self._run.config.train
        intervals = (train.log_every, train.validate_every, train.sample_every, train.checkpoint_every)
        return step == 1 or any(due(step, every, self._run.total_steps) for every in intervals)


def _class_name(callback: Callback) -> str:
    return type(callback).__name__
