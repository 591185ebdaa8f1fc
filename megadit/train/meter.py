"""``Meter``: what is measured of a run since its last log line, and the record made of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadit.data import Batch
from megadit.diffusion import LossTerms
from megadit.plan import forward_flops, peak_flops
from megadit.train.callbacks import Record
from megadit.train.metrics import Clock, LossSums, memory_gb, model_flops_utilization
from megadit.train.run import TrainingRun
from megadit.train.spikes import Spike, SpikeDetector


@dataclass
class _Step:
    """What this rank measured in one optimizer step: sums, and the loss of every sample beside its number."""

    sums: LossSums
    samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Meter:
    """Sums and clock of the window since the last log line, and the log record made of them.

    The last two steps are kept apart: what is wrong with a step is known when the next one is under way.
    """

    def __init__(self, run: TrainingRun, earlier: Sequence[float] = ()) -> None:
        """``earlier``: losses that the run logged before it was resumed."""
        self._run = run
        self._spikes = SpikeDetector(earlier)
        name = ""
        if run.context.device.type == "cuda":
            name = torch.cuda.get_device_name(run.context.device)
        self._peak = peak_flops(name, run.config.train.precision)
        # Counting imports sympy: where there is no peak to compare with, it would cost seconds for nothing.
        self._flops = 0 if self._peak is None else forward_flops(run.config.model)
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.spikes: list[Spike] = []  # in the window of the last record
        self._sums, self.clock = LossSums(self._run.context.device), Clock()
        self._steps: deque[_Step] = deque()
        self._step_sums: list[Tensor] = []

    def begin_step(self) -> None:
        """Before the first micro batch of an optimizer step."""
        if len(self._steps) == 2:
            self._close_step()
        self.clock.steps += 1
        self._steps.append(_Step(LossSums(self._run.context.device)))

    def _close_step(self) -> None:
        sums = self._steps.popleft().sums
        self._sums.merge(sums)
        nothing = torch.zeros((), dtype=torch.float64, device=self._run.context.device)
        self._step_sums.append(sums.total.get("", nothing))  # of a pipeline only the last stage has losses

    def add(self, batch: Batch, terms: LossTerms, time01: Tensor) -> None:
        """Add a micro batch of the step; nothing waits for the device. ``time01``: (B,) position in [0, 1]."""
        step = self._steps[-1]
        step.sums.add(terms, time01)
        step.samples.append((batch.numbers, terms.total.detach()))

    def drop_step(self) -> None:
        """Take back the last step: what is told now is of the one before."""
        self._steps.pop()
        self.clock.steps -= 1

    def broken_samples(self) -> dict[int, float]:
        """Samples of the last step whose losses are not finite, by number (collective)."""
        found = {
            number: loss for part in self._run.context.gather_objects(list(self._broken())) for number, loss in part
        }
        return dict(sorted(found.items()))

    def _broken(self) -> Iterator[tuple[int, float]]:
        for numbers, losses in self._steps[-1].samples:
            for number, loss in zip(numbers.tolist(), losses.float().cpu(), strict=True):
                if not loss.isfinite():
                    yield number, float(loss)

    def record(self, norm: float | None) -> Record:
        """The log record of the step just made (collective: all ranks call)."""
        run = self._run
        step = run.position.step
        while self._steps:
            self._close_step()
        losses, of_steps = self._sums.reduce(run.context, self._step_sums)
        self.spikes = self._spikes.look(step - len(of_steps) + 1, of_steps)
        rates = self.clock.rates(run.config.train.global_batch)
        mfu = model_flops_utilization(self._flops, rates["images_per_s"], self._peak, run.context.world_size)
        return {
            "step": step,
            **losses,
            "max_step_loss": max(of_steps),
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
