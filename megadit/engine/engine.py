"""The training engine: a model, the μP optimizer and a DeepSpeed configuration, as one object that steps.

Only public DeepSpeed calls are made here; whatever needs its internals goes through ``partitions``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config import OptimConfig
from megadit.config.deepspeed.gradients import with_bucket
from megadit.config.schema.run import ONLINE, EmaConfig
from megadit.data import Batch
from megadit.diffusion import NoisyBatch
from megadit.engine.deepspeed.grad_accumulation import float32_sums
from megadit.engine.deepspeed.guard import Reading
from megadit.engine.deepspeed.partitions import Partitions, avoid_shm_build, forget_groups, restore_linear
from megadit.engine.ema import Ema
from megadit.engine.optimizer import MuOptimizer
from megadit.engine.schedule import Schedule
from megadit.parallel import ProcessContext
from megadit.parallel.topology import Groups, ModelParallelUnit

Sample = tuple[Batch, NoisyBatch]


class TrainingEngine:
    """DeepSpeed's engine over ``model``: ZeRO stage, precision, accumulation and clipping as in ``ds_config``.

    ``groups``: of the ranks that share layers; None where every rank has all of them. ``reading`` is of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        schedule: Schedule,
        ds_config: dict[str, Any],
        context: ProcessContext,
        ema: EmaConfig | None = None,
        groups: Groups | None = None,
    ) -> None:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        avoid_shm_build()
        # DeepSpeed 0.19 calls collectives that torch 2.13 is about to rename, which torch says at every one of them.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        restore_linear()
        forget_groups()
        self.context = context
        ds_config = with_bucket(ds_config, sum(p.numel() for p in model.parameters()))
        self._engine, self.optimizer, self.partitions = self._wrap(model, optim, schedule, ds_config, groups)
        self.ema = Ema(self.partitions, ema or EmaConfig())
        self.optimizer.check_table(0, "after deepspeed.initialize")
        self.accumulation = int(self._engine.gradient_accumulation_steps())
        self.reading = Reading()
        self._loss_scaled = bool(self._engine.fp16_enabled())
        self._losses_finite = torch.ones((), dtype=torch.bool, device=context.device)
        self._checked_step = False

    def _wrap(
        self, model: nn.Module, optim: OptimConfig, schedule: Schedule, ds_config: dict[str, Any], groups: Groups | None
    ) -> tuple[Any, MuOptimizer, Partitions]:
        import deepspeed

        optimizer = MuOptimizer(model, optim, schedule, self.context.device)
        mpu = None if groups is None else ModelParallelUnit(groups)
        with float32_sums():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer.inner, config=dict(ds_config), mpu=mpu)
        return engine, optimizer, Partitions(engine, optimizer.clip, groups.topology if groups else None)

    @property
    def module(self) -> nn.Module:
        """The wrapped model (under ZeRO-3 its parameters are gathered by hooks as its layers run)."""
        return self._engine.module

    @property
    def reads_data(self) -> bool:
        """Whether this rank needs samples: to run the model on them, or to compute a loss from them."""
        return True

    @property
    def computes_loss(self) -> bool:
        """Whether this rank computes losses."""
        return True

    @property
    def skipped_steps(self) -> int:
        """Updates left out because gradients overflowed."""
        return int(self._engine.skipped_steps)

    @property
    def update_applied(self) -> bool:
        """Whether the last optimizer step changed the weights; DeepSpeed skips updates from overflowed gradients."""
        return bool(self._engine.was_step_applied())

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, project: bool = False) -> Any:
        """The model's output for one micro batch, through DeepSpeed's hooks; with ``project`` its REPA tokens too."""
        self.ema.settle()
        return self._engine(x, t, cond, project=project)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the micro batch's mean loss; DeepSpeed divides by the accumulation steps."""
        self._engine.backward(loss)

    def watched(self, loss: Tensor) -> Tensor:
        """The loss of a micro batch, whose gradient is NaN throughout where the loss is not finite.

        So that the norm of the reduced gradients tells all ranks of it; otherwise the values are what they were.
        """
        finite = loss.detach().isfinite()
        if self._loss_scaled:
            self._losses_finite &= finite
        return loss * torch.where(finite, 1.0, torch.nan)

    def train_step(
        self, step: int, micro_batches: Iterable[Sample], loss: Callable[..., Tensor], want_norm: bool
    ) -> float | None:
        """One update from the micro batches of optimizer step ``step``.

        ``loss(forward, batch, noisy)`` is the mean loss of a micro batch, ``forward`` the model to be called in it.
        Returns the global gradient norm before clipping when ``want_norm`` is set.
        """
        norm = None
        for number, (batch, noisy) in enumerate(micro_batches, start=1):
            self.backward(self.watched(loss(self.forward, batch, noisy)))
            norm = self.micro_step(step, number == self.accumulation, want_norm)
        return norm

    def micro_step(self, step: int, last: bool, want_norm: bool) -> float | None:
        """End one micro batch; after the ``last`` of an optimizer step, update with that step's learning rates.

        Returns the global gradient norm before clipping when the update was made and ``want_norm`` is set.
        """
        if not last:
            self._engine.step()
            return None
        return self._update(step, self._engine.step, want_norm)

    def _update(self, step: int, update: Callable[[], Any], want_norm: bool) -> float | None:
        self.optimizer.apply(step)
        self.partitions.norms.before_step(want_norm)
        update()
        if self.update_applied:
            self.ema.update(step + 1 - self.skipped_steps, self.partitions.guard.made)
        self.reading = self._read()
        if not self._checked_step:
            self.optimizer.check_table(step, "after the first step")
            self._checked_step = True
        return self.partitions.gradient_norm() if want_norm else None

    def _read(self) -> Reading:
        """What the last step was like. fp16's skipped updates are normal, unless a loss was not finite (collective)."""
        if not self._loss_scaled:
            return self.partitions.guard.reading()
        finite, self._losses_finite = self._losses_finite, torch.ones_like(self._losses_finite)
        return Reading(masked=not self.update_applied and self.context.any(not bool(finite)))

    def restored(self, step: int) -> None:
        """Say that a checkpoint was loaded: learning rates come from the config, never from the checkpoint."""
        self.optimizer.apply(step)
        self.optimizer.check_table(step, "after resume")
        self._checked_step = False

    @contextmanager
    def evaluation(self, weights: str = ONLINE) -> Iterator[Any]:
        """``with engine.evaluation() as module:`` the model in eval mode without gradients, to be called.

        weights: online, or the name of an average, which takes their place meanwhile. All ranks must enter.
        """
        self.ema.settle()
        with nullcontext() if weights == ONLINE else self.ema.swapped(weights), torch.no_grad():
            self._engine.eval()
            try:
                yield self._callable()
            finally:
                self._engine.train()

    def _callable(self) -> Any:
        return self._engine.module
