"""The training engine: a model, its loss, the μP optimizer and DeepSpeed, as one object that trains on batches.

Only DeepSpeed's public interface is used here; its internals are in ``megadit.engine.deepspeed``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megadit.config import RunConfig
from megadit.config.deepspeed.gradients import with_bucket
from megadit.config.schema.run import ONLINE
from megadit.data import Batch
from megadit.diffusion import LossTerms, NoisyBatch
from megadit.engine.deepspeed.gather import gather_compiled_blocks_whole
from megadit.engine.deepspeed.grad_accumulation import force_zero_optimizer
from megadit.engine.deepspeed.guard import LossScaleExhausted, UpdateStatus
from megadit.engine.deepspeed.partitions import Partitions, avoid_shm_build, forget_groups, restore_linear
from megadit.engine.ema import Ema
from megadit.engine.loss import BatchLosses, TrainingLoss
from megadit.engine.optimizer import MuOptimizer
from megadit.engine.schedule import Schedule
from megadit.parallel import ProcessContext
from megadit.parallel.topology import ModelParallelUnit, ProcessGroups


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step on this rank.

    losses: of its micro batches, in order; empty on a rank that computes none.  grad_norm: over all parameters, before
    clipping; None where it was not asked for.  update_status: whether the update was applied, on its way to the host.
    exhausted_scale: fp16's smallest loss scale, where gradients overflowed at it: no update was made.
    """

    losses: Sequence[BatchLosses]
    grad_norm: float | None = None
    update_status: UpdateStatus = field(default_factory=UpdateStatus)
    exhausted_scale: float | None = None


class TrainingEngine:
    """DeepSpeed's engine over ``model``: ZeRO stage, precision, accumulation and clipping as in ``ds_config``.

    ``groups``: of the ranks that share layers; None where every rank has all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: TrainingLoss,
        config: RunConfig,
        schedule: Schedule,
        ds_config: dict[str, Any],
        context: ProcessContext,
        groups: ProcessGroups | None = None,
    ) -> None:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        avoid_shm_build()
        # DeepSpeed 0.19 calls collectives that torch 2.13 deprecates, with a warning at every call.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        restore_linear()
        forget_groups()
        self.context, self.loss, self._config, self._schedule = context, loss, config, schedule
        ds_config = with_bucket(ds_config, sum(p.numel() for p in model.parameters()))
        self._engine, self.optimizer, self.partitions = self._wrap(model, ds_config, groups)
        self.ema = Ema(self.partitions, config.ema)
        self.optimizer.check_table(0, "after deepspeed.initialize")
        self.accumulation = int(self._engine.gradient_accumulation_steps())
        self._losses: list[BatchLosses] = []  # of the step under way
        self._loss_scaled = bool(self._engine.fp16_enabled())
        self._losses_finite = torch.ones((), dtype=torch.bool, device=context.device)
        self._checked_step = False

    def _wrap(
        self, model: nn.Module, ds_config: dict[str, Any], groups: ProcessGroups | None
    ) -> tuple[Any, MuOptimizer, Partitions]:
        import deepspeed

        optimizer = MuOptimizer(model, self._config.optim, self._schedule, self.context.device)
        mpu = None if groups is None else ModelParallelUnit(groups)
        gather_compiled_blocks_whole(model)
        with force_zero_optimizer():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer.inner, config=dict(ds_config), mpu=mpu)
        return engine, optimizer, Partitions(engine, optimizer.clip, groups.topology if groups else None)

    @property
    def module(self) -> nn.Module:
        """The wrapped model (under ZeRO-3 its parameters are gathered by hooks as its layers run)."""
        return self._engine.module

    @property
    def reads_data(self) -> bool:
        """Whether this rank reads samples, as input of the model or to compute the loss."""
        return True

    @property
    def computes_loss(self) -> bool:
        """Whether this rank computes losses."""
        return True

    @property
    def skipped_steps(self) -> int:
        """Number of updates skipped because fp16 gradients overflowed."""
        return int(self._engine.skipped_steps)

    @property
    def update_applied(self) -> bool:
        """Whether the last optimizer step was applied, as far as DeepSpeed knows (see ``StepResult.update_status``)."""
        return bool(self._engine.was_step_applied())

    def train_batch(self, step: int, batches: Iterable[Batch], want_norm: bool) -> StepResult:
        """Optimizer step ``step`` (0-based): forward, loss and backward of each micro batch, then the update.

        The global gradient norm is taken if ``want_norm`` is set.
        """
        self.ema.publish_if_stale()
        for number, batch in enumerate(batches, start=1):
            noisy = self.loss.prepare(batch)
            outputs = self._engine(noisy.x, noisy.t, noisy.cond, project=self.loss.needs_projection)
            self._engine.backward(self._mean_loss(outputs, batch, noisy))
            if number < self.accumulation:
                self._engine.step()
        return self._update(step, self._engine.step, want_norm)

    def _mean_loss(self, outputs: Any, batch: Batch, noisy: NoisyBatch) -> Tensor:
        """The mean loss of a micro batch, () float32.

        Where it is not finite its gradient is NaN throughout, so that all ranks find it in the reduced norm.
        """
        terms = self.loss.compute(outputs, batch, noisy)
        parts = {name: part.detach() for name, part in terms.terms.items()}
        self._losses.append(BatchLosses(batch.numbers, LossTerms(terms.total.detach(), parts), noisy.time01))
        loss = terms.total.mean()
        finite = loss.detach().isfinite()
        if self._loss_scaled:
            self._losses_finite &= finite
        return loss * torch.where(finite, 1.0, torch.nan)

    def _update(self, step: int, update: Callable[[], Any], want_norm: bool) -> StepResult:
        """Update by DeepSpeed's ``update``, with the learning rates of ``step``."""
        self.optimizer.apply(step)
        self.partitions.before_step(want_norm)
        exhausted = None
        try:
            update()
        except LossScaleExhausted as error:
            exhausted = error.scale
        losses, self._losses = self._losses, []
        if exhausted is not None:
            return StepResult(losses, exhausted_scale=exhausted)
        if self.update_applied:
            self.ema.update(step + 1 - self.skipped_steps, self.partitions.guard.applied)
        update_status = self._update_status()
        if not self._checked_step:
            self.optimizer.check_table(step, "after the first step")
            self._checked_step = True
        return StepResult(losses, self.partitions.gradient_norm() if want_norm else None, update_status)

    def _update_status(self) -> UpdateStatus:
        """Status of the last update; fp16's skipped ones are normal, unless a loss was not finite (collective)."""
        if not self._loss_scaled:
            return self.partitions.guard.update_status()
        finite, self._losses_finite = self._losses_finite, torch.ones_like(self._losses_finite)
        return UpdateStatus(masked=not self.update_applied and self.context.any(not bool(finite)))

    def after_restore(self, step: int) -> None:
        """After a checkpoint was loaded: learning rates come from the config, never from the checkpoint."""
        self.optimizer.apply(step)
        self.optimizer.check_table(step, "after resume")
        self._checked_step = False

    @contextmanager
    def evaluation(self, weights: str = ONLINE) -> Iterator[None]:
        """Inside the block the model is in eval mode, without gradients.

        weights: online, or the name of an average, which takes their place. All ranks must enter.
        """
        self.ema.publish_if_stale()
        with nullcontext() if weights == ONLINE else self.ema.swapped(weights), torch.no_grad():
            self._engine.eval()
            try:
                yield
            finally:
                self._engine.train()

    def evaluate_batch(self, batch: Batch | None = None, noisy: NoisyBatch | None = None) -> dict[str, Tensor]:
        """Losses of a batch within ``evaluation``, as ``TrainingLoss.per_sample`` gives them (all ranks must call).

        Empty on a rank that computes none. ``noisy`` was made from ``batch``; a rank that reads no data has neither.
        """
        inputs = () if noisy is None else (noisy.x, noisy.t, noisy.cond)
        outputs = self._full_model()(*inputs, project=self.loss.needs_projection)
        if not self.computes_loss:
            return {}
        assert batch is not None and noisy is not None
        return self.loss.per_sample(outputs, batch, noisy)

    @contextmanager
    def sampling_model(self, weights: str = ONLINE) -> Iterator[nn.Module]:
        """``with engine.sampling_model() as model:`` the whole model as a sampler calls it, in ``evaluation``."""
        with self.evaluation(weights):
            yield self._full_model()

    def _full_model(self) -> nn.Module:
        return self.module
