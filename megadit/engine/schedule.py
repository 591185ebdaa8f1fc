"""Learning-rate schedules as one multiplicative factor in [0, 1].

The learning rate of a group is always ``factor(step) * optim.lr * lr_mult``: the schedule multiplies, so the
ratios between groups that μP prescribes hold at every step (schedulers with an absolute floor or peak, such
as OneCycle or CosineAnnealing with eta_min, would bend them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from megadit.config import OptimConfig
from megadit.config.schema.lengths import steps_of
from megadit.errors import UserError
from megadit.extensions import SCHEDULES


def steps_of_epochs(epochs: float, images: int, batch: int) -> int:
    """Optimizer steps of ``epochs`` passes over ``images``, rounded up to a whole batch."""
    exact = Fraction(str(epochs))  # 1.1 as written: in floats 1.1 * 100 / 10 is above 11
    return math.ceil(exact * images / batch)


def constant(step: int, schedule: Schedule) -> float:
    """1 at every step."""
    return 1.0


def cosine(step: int, schedule: Schedule) -> float:
    """Half a cosine from 1 at the end of the warm-up to ``schedule.floor`` at the end of the run."""
    done = (step - schedule.warmup) / max(1, schedule.total - schedule.warmup)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def wsd(step: int, schedule: Schedule) -> float:
    """1, then over the last ``schedule.decay`` steps linear decay to ``schedule.floor``."""
    left = max(0, schedule.total - step) / schedule.decay
    return schedule.floor + (1 - schedule.floor) * min(1.0, left)


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
        """Resolve lengths and shares against the run's ``total_steps``; the wsd decay is a tenth of it by default.

        Raises:
            UserError: warm-up and decay together are longer than the run.
        """
        warmup = steps_of(optim.warmup_steps, total_steps)
        decay = max(1, steps_of("10%" if optim.decay_steps is None else optim.decay_steps, total_steps))
        shares = "give them as shares of the run, such as optim.warmup_steps=5%"
        if optim.schedule == "wsd" and warmup + decay > total_steps:
            raise UserError(
                f"optim.warmup_steps: {_length(optim.warmup_steps, warmup)} plus {decay:,} decay steps exceed the "
                f"run's {total_steps:,} steps; shorten optim.warmup_steps or optim.decay_steps, or {shares}"
            )
        if optim.schedule == "cosine" and warmup >= total_steps:
            raise UserError(
                f"optim.warmup_steps: {_length(optim.warmup_steps, warmup)} leaves nothing of the run's "
                f"{total_steps:,} steps for the cosine; shorten it, or give it as a share such as 5%"
            )
        return cls(optim.schedule, warmup, total_steps, decay, optim.min_lr_ratio)

    @property
    def warning(self) -> str | None:
        """A warning of a warm-up as long as a run without decay; else None."""
        if self.kind != "constant" or self.warmup < max(2, self.total):
            return None
        peak = self.factor(self.total - 1)
        return (
            f"optim.warmup_steps: {self.warmup:,} are no fewer than the run's {self.total:,} steps, so that its "
            f"learning rate ends at {100 * peak:.3g}% of optim.lr; shorten it, or give it as a share such as 5%"
        )

    def factor(self, step: int) -> float:
        """The factor of update ``step`` (0-based). Warm-up is linear from 1/warmup on: none has a factor of zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self._after_warmup(step, self)

    @cached_property
    def _after_warmup(self) -> Callable[[int, Schedule], float]:
        return SCHEDULES.get(self.kind)


def _length(written: int | str, steps: int) -> str:
    """Steps as a person wrote them: ``50``, or ``5% (50 steps)``."""
    return f"{written:,}" if isinstance(written, int) else f"{written} ({steps:,} steps)"
