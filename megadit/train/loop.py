"""The training loop: batches in, optimizer steps out. What else happens in a run is a callback."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megadit.data import Batch, BatchStream
from megadit.diffusion import NoisyBatch
from megadit.errors import harmless
from megadit.ownership import OwnershipLost
from megadit.plan import forward_flops, peak_flops
from megadit.train.callbacks import Callback, Record, RunStopped
from megadit.train.callbacks.base import due
from megadit.train.checkpoint import Position
from megadit.train.engine import Sample
from megadit.train.metrics import Clock, LossSums, memory_gb, model_flops_utilization
from megadit.train.preemption import Interrupt, preemption_signals
from megadit.train.run import TrainingRun

_PREEMPTION_CHECK_STEPS = 10
_PASSING = (RunStopped, OwnershipLost)  # these are no failures of a callback


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


def fit(run: TrainingRun, stream: BatchStream, callbacks: Sequence[Callback]) -> bool:
    """Train from ``run.position`` to ``run.total_steps``.

    Returns True when the run is complete and False when it was preempted (after a good checkpoint, or before a step).

    Raises:
        TrainingDiverged: loss or gradients of a logged step were not finite; nothing is saved after it.
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
    meter = Meter(run)
    while run.position.step < run.total_steps:
        step, batch_size = run.position.step, run.config.train.global_batch
        log = _is_logged(run, step + 1)
        norm = optimizer_step(run, batches, meter, log)
        run.position = Position(step + 1, run.position.samples_seen + batch_size, run.engine.skipped_steps)
        preempted = _is_preempted(run, interrupt)
        # The step before a checkpoint is always logged: a window is never cut in two, and what is saved is finite.
        record = meter.record(norm) if log or preempted else None
        if record is not None:
            _refuse_divergence(run, record)
        _after_step(run, callbacks, record, preempted)
        if preempted:
            if run.saved_step != run.position.step:
                run.save()
            return False
        if log:
            meter.restart()
    return True


def _is_preempted(run: TrainingRun, interrupt: Interrupt) -> bool:
    """Whether to stop before the run's end, agreed by all ranks (every few steps, as it waits for the device)."""
    step = run.position.step
    ask = run.context.world_size == 1 or step % _PREEMPTION_CHECK_STEPS == 0
    return ask and step < run.total_steps and run.context.any(interrupt.raised)


def _refuse_divergence(run: TrainingRun, record: Record) -> None:
    """Raise TrainingDiverged for a loss that is not finite, or an update made from gradients that were not."""
    norm = record["grad_norm"]
    if not math.isfinite(record["loss"]):
        what = f"the loss at step {record['step']} is {record['loss']}"
    elif norm is not None and not math.isfinite(norm) and run.engine.update_applied:
        what = f"the gradients at step {record['step']} are not finite"
    else:
        return
    raise TrainingDiverged(
        f"{what}: the run has diverged (optim.lr {run.config.optim.lr:g}); lower optim.lr, or set optim.clip.value"
    )


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
        meter.sums.add(terms, noisy.time01)
        return terms.total.mean()

    norm = run.engine.train_step(run.position.step, prepared(), loss, want_norm)
    meter.clock.steps += 1
    return norm


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


class Meter:
    """Sums and clock of the window since the last log line, and the log record made of them."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        name = ""
        if run.context.device.type == "cuda":
            import torch

            name = torch.cuda.get_device_name(run.context.device)
        self._peak = peak_flops(name, run.config.train.precision)
        # Counting imports sympy: where there is no peak to compare with, it would cost seconds for nothing.
        self._flops = 0 if self._peak is None else forward_flops(run.config.model)
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.sums, self.clock = LossSums(self._run.context.device), Clock()

    def record(self, norm: float | None) -> Record:
        """The log record of the step just made (collective: all ranks call)."""
        run = self._run
        step = run.position.step
        losses = self.sums.reduce(run.context)
        rates = self.clock.rates(run.config.train.global_batch)
        mfu = model_flops_utilization(self._flops, rates["images_per_s"], self._peak, run.context.world_size)
        return {
            "step": step,
            **losses,
            "grad_norm": norm,
            "grad_norms": None if norm is None else run.engine.partitions.norms.values(),
            "lr": run.engine.optimizer.base_lr(step - 1),
            "lr_groups": run.engine.optimizer.learning_rates(),
            **rates,
            "mfu": mfu,
            "mem_gb": round(memory_gb(run.context.device), 3),
            "samples_seen": run.position.samples_seen,
            "skipped_steps": run.position.skipped_steps,
        }
