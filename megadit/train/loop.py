"""The training loop: batches in, optimizer steps out. What else happens in a run is a callback."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor

from megadit.checkpoint.format import Position
from megadit.data import Batch, BatchStream, SampleOrder
from megadit.data.windows import shown
from megadit.diffusion import NoisyBatch
from megadit.engine.deepspeed.guard import LossScaleExhausted, Reading
from megadit.engine.engine import Sample
from megadit.errors import harmless, say
from megadit.files.ownership import OwnershipLost
from megadit.train.callbacks import Callback, Record, RunStopped
from megadit.train.callbacks.base import due
from megadit.train.divergence import LEFT_OUT, SPIKE, Spike, describe
from megadit.train.metrics import Meter
from megadit.train.preemption import Interrupt, preemption_signals
from megadit.train.run import TrainingRun

_PREEMPTION_CHECK_STEPS = 10
_PASSING = (RunStopped, OwnershipLost)  # these are no failures of a callback


def fit(run: TrainingRun, stream: BatchStream, callbacks: Sequence[Callback]) -> bool:
    """Train from ``run.position`` to ``run.total_steps``.

    Returns True when the run is complete and False when it was preempted (after a good checkpoint, or before a step).

    Raises:
        TrainingDiverged: loss or gradients were not finite. It is known when the next step was made at the latest, and
            before anything is logged or saved of the step itself or of a later one.
    """
    batches = iter(stream)
    try:
        with preemption_signals() as interrupt:
            run.context.on_main(run.directory.check_ownership)
            for callback in callbacks:
                callback.on_start(run)
            complete = _steps(run, batches, callbacks, interrupt)
            for callback in callbacks:
                with harmless(_name(callback), _PASSING):
                    callback.on_end(run)
        return complete
    finally:
        for callback in callbacks:
            with harmless(f"closing {_name(callback)}"):  # nor may it take the place of the error that ended the run
                callback.close()


def _steps(run: TrainingRun, batches: Iterator[Any], callbacks: Sequence[Callback], interrupt: Interrupt) -> bool:
    if run.position.step < run.total_steps and run.context.any(interrupt.raised):
        return False  # nothing was trained since the start, and so nothing is to be saved
    meter = Meter(run, run.context.on_main(lambda: _logged_losses(run)))
    reading = Reading()
    events: list[dict[str, Any]] = []
    while run.position.step < run.total_steps:
        step, batch_size = run.position.step, run.config.train.global_batch
        log = _is_logged(run, step + 1)
        try:
            norm = optimizer_step(run, batches, meter, log)
        except LossScaleExhausted as error:
            run.position = Position(step + 1, run.position.samples_seen + batch_size, run.engine.skipped_steps)
            _diverge(run, callbacks, meter, events, Reading(), error.scale)
        if reading.bad():  # of the step before: the device had this one to do while the host waited for the answer
            meter.drop_step()
            _diverge(run, callbacks, meter, events, reading)
        reading = run.engine.reading
        events += _left_out(run)
        run.position = Position(step + 1, run.position.samples_seen + batch_size, run.engine.skipped_steps)
        preempted = _is_preempted(run, interrupt)
        # The step before a checkpoint is always logged: a window is never cut in two, and what is saved is finite.
        if (log or preempted) and reading.bad():
            _diverge(run, callbacks, meter, events, reading)
        record = meter.record(norm) if log or preempted else None
        if record is not None:
            events += _spikes(run, meter.spikes)
            record |= {"events": events} if events else {}
            events = []
        _after_step(run, callbacks, record, preempted)
        if preempted:
            if run.saved_step != run.position.step:
                run.save()
            return False
        if log:
            meter.restart()
    return True


def _left_out(run: TrainingRun) -> list[dict[str, Any]]:
    """Events of the windows of samples that the step just made is the first to leave behind."""
    step = run.position.step + 1
    windows = run.layout.jumped(step - 1) if run.layout.left_out else []
    if windows and run.context.is_main:
        say(f"note: step {step} leaves out {shown(windows)} (train.skip_samples)")
    return [{"kind": LEFT_OUT, "step": step, "samples": [list(window)]} for window in windows]


def _spikes(run: TrainingRun, spikes: Sequence[Spike]) -> list[dict[str, Any]]:
    """Events of the steps whose loss was far above those before."""
    events = []
    for spike in spikes:
        windows = run.layout.windows(spike.step - 1)
        if run.context.is_main:
            say(
                f"warning: the loss at step {spike.step} is {spike.loss:.4g} after {spike.median:.4g} (median of "
                f"{spike.count} before); the step took {shown(windows)}"
            )
        samples = [list(window) for window in windows]
        events.append(
            {"kind": SPIKE, "step": spike.step, "loss": spike.loss, "median": spike.median, "samples": samples}
        )
    return events


def _logged_losses(run: TrainingRun) -> list[float]:
    """Losses that the run logged before it was resumed, as far as they are finite."""
    try:
        rows = run.directory.read_metrics() if run.position.step else []
    except (OSError, ValueError):  # torn by a kill
        return []
    return [row["loss"] for row in rows if row.get("loss") is not None and row["step"] <= run.position.step]


def _diverge(
    run: TrainingRun,
    callbacks: Sequence[Callback],
    meter: Meter,
    events: list[dict[str, Any]],
    reading: Reading,
    at_scale: float | None = None,
) -> NoReturn:
    """Log the step where the run stands, which was not finite, and raise (all ranks alike)."""
    broken = meter.broken_samples()
    run.engine.optimizer.apply(run.position.step - 1)  # a later step may have been prepared since
    record = meter.record(math.inf) | {"grad_norms": None}
    events = [*events, *_spikes(run, meter.spikes)]
    order = SampleOrder(len(run.train_set), run.config.train.seed)
    roles, all_roles = reading.bad_roles(), set(run.engine.optimizer.clip.roles)
    error = describe(run.position.step, run.layout, order, broken, roles, all_roles, at_scale)
    for callback in callbacks:
        callback.on_divergence(run, record | {"events": [*events, error.event]})
    raise error


def _is_preempted(run: TrainingRun, interrupt: Interrupt) -> bool:
    """Whether to stop before the run's end, agreed by all ranks (every few steps, as it waits for the device)."""
    step = run.position.step
    ask = run.context.world_size == 1 or step % _PREEMPTION_CHECK_STEPS == 0
    return ask and step < run.total_steps and run.context.any(interrupt.raised)


def optimizer_step(run: TrainingRun, batches: Iterator[Any], meter: Meter, want_norm: bool) -> float | None:
    """One update: every micro batch forward and backward, then the optimizer.

    Returns the global gradient norm before clipping when ``want_norm`` is set.
    """
    seed = run.config.train.seed

    def prepared() -> Iterator[Sample]:
        for _ in range(run.layout.accumulation):
            begin = time.perf_counter()
            batch = next(batches)
            meter.clock.waited += time.perf_counter() - begin
            x0, cond = run.inputs(batch, seed)
            yield batch, run.objective.prepare(x0, cond, batch.numbers, seed)

    def loss(forward: Callable[..., Any], batch: Batch, noisy: NoisyBatch) -> Tensor:
        terms = run.losses(forward, batch, noisy)
        meter.add(batch, terms, noisy.time01)
        return terms.total.mean()

    meter.begin_step()
    return run.engine.train_step(run.position.step, prepared(), loss, want_norm)


def _is_logged(run: TrainingRun, step: int) -> bool:
    """Steps that get a record: every ``log_every``, the first, and whatever validates, samples or saves.

    A checkpoint is thus known to be finite, and the clock of a window never holds the time of those three.
    """
    train = run.config.train
    others = (train.validate_every, train.sample_every, train.checkpoint_every)
    return step == 1 or any(due(step, every, run.total_steps) for every in (train.log_every, *others))


def _after_step(run: TrainingRun, callbacks: Sequence[Callback], record: Record | None, preempted: bool) -> None:
    """``on_step`` of all callbacks, then the log with what they added, then what must come after the log.

    Of the last of these a failure ends the run, unless it ends anyway and is saved (a preempted one is, in a moment).
    """
    for callback in callbacks:
        addition = callback.on_step(run)
        if addition and record is not None:
            record |= addition
    if record is not None:
        run.context.on_main(run.directory.check_ownership)
        for callback in callbacks:
            callback.on_log(run, record)
    for callback in callbacks:
        over = preempted or run.saved_step == run.position.step == run.total_steps
        with harmless(_name(callback), _PASSING) if over else contextlib.nullcontext():
            callback.after_log(run)


def _name(callback: Callback) -> str:
    return type(callback).__name__
