"""Learning-rate schedules as one multiplicative factor in [0, 1].

The learning rate of a group is always ``factor(step) * optim.lr * lr_mult``: the schedule multiplies, so the
ratios between groups that μP prescribes hold at every step (schedulers with an absolute floor or peak, such
as OneCycle or CosineAnnealing with eta_min, would bend them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megadit.config import OptimConfig
from megadit.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then ``kind``; all lengths in optimizer steps (not micro steps, not steps per process)."""

    kind: str
    warmup: int
    total: int
    decay: int
    floor: float

    @classmethod
    def from_config(cls, optim: OptimConfig, total_steps: int) -> Schedule:
        """Resolve lengths against the run's ``total_steps``; the wsd decay is a tenth of it by default.

        Raises:
            UserError: warm-up and decay together are longer than the run.
        """
        decay = optim.decay_steps or max(1, total_steps // 10)
        if optim.schedule == "wsd" and optim.warmup_steps + decay > total_steps:
            raise UserError(
                f"optim.warmup_steps: {optim.warmup_steps} plus {decay} decay steps exceed the run's {total_steps} "
                "steps; shorten optim.warmup_steps or optim.decay_steps"
            )
        if optim.schedule == "cosine" and optim.warmup_steps >= total_steps:
            raise UserError(
                f"optim.warmup_steps: {optim.warmup_steps} leaves nothing of the run's {total_steps} steps for the "
                "cosine; shorten it"
            )
        return cls(optim.schedule, optim.warmup_steps, total_steps, decay, optim.min_lr_ratio)

    def factor(self, step: int) -> float:
        """The factor of the update that follows ``step`` completed ones (0-based).

        Warm-up is linear and its first update already has 1/warmup, so no update is wasted at zero.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "cosine":
            done = (step - self.warmup) / max(1, self.total - self.warmup)
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.kind == "wsd":
            left = max(0, self.total - step) / self.decay
            return self.floor + (1 - self.floor) * min(1.0, left)
        return 1.0
