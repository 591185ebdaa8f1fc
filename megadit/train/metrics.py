"""What is measured between two log lines, summed on the device and reduced once over the ranks."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megadit.diffusion import LossTerms
from megadit.parallel import ProcessContext

TIME_BINS = 10


@dataclass
class LossSums:
    """Sums of per-sample losses, by term and by bin of the timestep, over a window of micro batches."""

    device: torch.device
    total: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    bins: Tensor | None = None

    def add(self, terms: LossTerms, time01: Tensor) -> None:
        """Add a micro batch; nothing waits for the device. ``time01``: (B,) position in [0, 1]."""
        named = {"": terms.total, **terms.terms}
        for name, values in named.items():
            part = values.detach().double().sum()
            self.total[name] = self.total[name] + part if name in self.total else part
        if self.bins is None:
            self.bins = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.device)
        index = (time01 * TIME_BINS).long().clamp_(0, TIME_BINS - 1)
        self.bins[0].index_add_(0, index, terms.total.detach().double())
        self.bins[1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.count += terms.total.shape[0]

    def merge(self, other: LossSums) -> None:
        """Add what another has summed."""
        for name, part in other.total.items():
            self.total[name] = self.total[name] + part if name in self.total else part
        if other.bins is not None:
            self.bins = other.bins if self.bins is None else self.bins + other.bins
        self.count += other.count

    def reduce(self, context: ProcessContext, steps: Sequence[Tensor] = ()) -> tuple[dict[str, Any], list[float]]:
        """Means over all ranks: ``loss``, ``loss_<term>`` and ``loss_bins`` (None where a bin got no sample).

        steps: of each optimizer step in the window this rank's sum of losses, () float64; their means come second.
        """
        # Of a pipeline only the last stage has losses, and only it knows their names.
        names = sorted({name for names in context.gather_objects(list(self.total)) for name in names})
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        head = torch.stack([self.total.get(name, nothing) for name in names])
        own = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.device) if self.bins is None else self.bins
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.device)
        per_step = torch.stack(list(steps)) if steps else head[:0]
        values = context.sum(torch.cat([count, head, own.flatten(), per_step])).tolist()
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
