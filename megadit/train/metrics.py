"""Metrics of the steps between two log lines: summed on the device, reduced once over the ranks, and logged."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megadit.data import Batch
from megadit.diffusion import LossTerms
from megadit.engine.loss import BatchLosses
from megadit.engine.tf32 import arithmetic
from megadit.parallel import ProcessContext
from megadit.plan import forward_flops, peak_flops
from megadit.train.callbacks import Record
from megadit.train.divergence import Spike, SpikeDetector
from megadit.train.run import TrainingRun

TIME_BINS = 10


@dataclass
class LossSums:
    """Sums of per-sample losses, by term and by bin of the timestep, over a window of micro batches."""

    device: torch.device
    total: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.bins = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.device)

    def add(self, terms: LossTerms, time01: Tensor) -> None:
        """Add a micro batch; nothing waits for the device. ``time01``: (B,) position in [0, 1]."""
        named = {"": terms.total, **terms.terms}
        for name, values in named.items():
            part = values.detach().double().sum()
            self.total[name] = self.total[name] + part if name in self.total else part
        index = (time01 * TIME_BINS).long().clamp_(0, TIME_BINS - 1)
        self.bins[0].index_add_(0, index, terms.total.detach().double())
        self.bins[1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.count += terms.total.shape[0]

    def merge(self, other: LossSums) -> None:
        """Add the sums of ``other``."""
        for name, part in other.total.items():
            self.total[name] = self.total[name] + part if name in self.total else part
        self.bins += other.bins
        self.count += other.count

    def reduce(self, context: ProcessContext, steps: Sequence[Tensor] = ()) -> tuple[dict[str, Any], list[float]]:
        """Means over all ranks: ``loss``, ``loss_<term>`` and ``loss_bins`` (None where a bin got no sample).

        steps: of each optimizer step in the window this rank's sum of losses, () float64; their means come second.
        """
        # Of a pipeline only the last stage has losses, and only it knows their names.
        names = sorted({name for names in context.gather_objects(list(self.total)) for name in names})
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        head = torch.stack([self.total.get(name, nothing) for name in names])
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.device)
        per_step = torch.stack(list(steps)) if steps else head[:0]
        values = context.sum(torch.cat([count, head, self.bins.flatten(), per_step])).tolist()
        samples, sums, bins = values[0], values[1 : 1 + len(names)], values[1 + len(names) :]
        means = [total * len(steps) / samples for total in bins[2 * TIME_BINS :]]
        result: dict[str, Any] = {}
        for name, value in zip(names, sums, strict=True):
            result[f"loss_{name}" if name else "loss"] = value / samples
        result["loss_bins"] = [
            loss / number if number else None
            for loss, number in zip(bins[:TIME_BINS], bins[TIME_BINS : 2 * TIME_BINS], strict=True)
        ]
        return result, means


@dataclass
class Clock:
    """Wall time of a window of steps, and how much of it was spent waiting for data (seconds)."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0

    def rates(self, global_batch: int) -> dict[str, float]:
        """``images_per_s``, ``step_s`` and ``data_wait_s`` (both per step)."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {
            "images_per_s": self.steps * global_batch / elapsed,
            "step_s": elapsed / self.steps,
            "data_wait_s": self.waited / self.steps,
        }


def memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def model_flops_utilization(
    flops_per_image: int, images_per_s: float, peak: float | None, world_size: int
) -> float | None:
    """MFU: 3 forward passes' FLOPs per image (forward and backward, recomputation not counted) over the peak."""
    return None if peak is None else 3 * flops_per_image * images_per_s / (peak * world_size)


class Meter:
    """Sums and clock of the window since the last log line, and the log record made of them."""

    def __init__(self, run: TrainingRun, earlier: Sequence[float] = ()) -> None:
        """``earlier``: losses that the run logged before it was resumed."""
        self._run = run
        self._spikes = SpikeDetector(earlier)
        name = ""
        if run.context.device.type == "cuda":
            name = torch.cuda.get_device_name(run.context.device)
        self._peak = peak_flops(name, arithmetic(run.config.train))
        # Counting imports sympy: where there is no peak to compare with, it would cost seconds for nothing.
        self._flops = 0 if self._peak is None else forward_flops(run.config.model)
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.spikes: list[Spike] = []  # in the window of the last record
        self.clock = Clock()
        self._sums = LossSums(self._run.context.device)
        self._step_sums: list[Tensor] = []
        self._last: Sequence[BatchLosses] = ()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro batches of one optimizer step; the time spent waiting for them is added to the clock."""
        for _ in range(self._run.layout.accumulation):
            begin = time.perf_counter()
            batch = next(batches)
            self.clock.waited += time.perf_counter() - begin
            yield batch

    def add(self, losses: Sequence[BatchLosses]) -> None:
        """Add an optimizer step's micro batches on this rank; nothing waits for the device."""
        sums = LossSums(self._run.context.device)
        for part in losses:
            sums.add(part.terms, part.time01)
        self._sums.merge(sums)
        nothing = torch.zeros((), dtype=torch.float64, device=self._run.context.device)
        self._step_sums.append(sums.total.get("", nothing))  # of a pipeline only the last stage has losses
        self.clock.steps += 1
        self._last = losses

    def broken_samples(self) -> dict[int, float]:
        """Samples of the last step whose losses are not finite, by number (collective)."""
        broken = [
            (number, float(loss))
            for part in self._last
            for number, loss in zip(part.numbers.tolist(), part.terms.total.float().cpu(), strict=True)
            if not loss.isfinite()
        ]
        return dict(sorted(pair for part in self._run.context.gather_objects(broken) for pair in part))

    def record(self, norm: float | None) -> Record:
        """The log record of the step just made (collective: all ranks call)."""
        run = self._run
        step = run.position.step
        losses, of_steps = self._sums.reduce(run.context, self._step_sums)
        self.spikes = self._spikes.update(step - len(of_steps) + 1, of_steps)
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
