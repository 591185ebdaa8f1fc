"""The training engine: a model, the μP optimizer and a DeepSpeed configuration, as one object that steps.

Only public DeepSpeed calls are made here; whatever needs its internals goes through ``partitions``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config import OptimConfig
from megadit.parallel import ProcessContext
from megadit.train.optimizer import MuOptimizer
from megadit.train.partitions import Partitions, avoid_shm_build
from megadit.train.schedule import Schedule


class TrainingEngine:
    """DeepSpeed's engine over ``model``: ZeRO stage, precision, accumulation and clipping as in ``ds_config``."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        schedule: Schedule,
        ds_config: dict[str, Any],
        context: ProcessContext,
    ) -> None:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
        avoid_shm_build()
        import deepspeed

        self.context = context
        self.optimizer = MuOptimizer(model, optim, schedule, context.device)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer.inner, config=dict(ds_config))
        self.partitions = Partitions(self._engine)
        self.optimizer.check_table(0, "after deepspeed.initialize")
        self.accumulation = int(self._engine.gradient_accumulation_steps())
        self._checked_step = False

    @property
    def module(self) -> nn.Module:
        """The wrapped model (under ZeRO-3 its parameters are gathered by hooks as its layers run)."""
        return self._engine.module

    @property
    def skipped_steps(self) -> int:
        """Updates left out because fp16 gradients overflowed."""
        return int(self._engine.skipped_steps)

    @property
    def update_applied(self) -> bool:
        """Whether the last optimizer step changed the weights; DeepSpeed skips updates from overflowed gradients."""
        return bool(self._engine.was_step_applied())

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The model's output for one micro batch, through DeepSpeed's hooks."""
        return self._engine(x, t, cond)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the micro batch's mean loss; DeepSpeed divides by the accumulation steps."""
        self._engine.backward(loss)

    def micro_step(self, step: int, last: bool, want_norm: bool) -> float | None:
        """End one micro batch; after the ``last`` of an optimizer step, update with that step's learning rates.

        Returns the global gradient norm before clipping when the update was made and ``want_norm`` is set.
        """
        if not last:
            self._engine.step()
            return None
        self.optimizer.apply(step)
        norm = self.partitions.gradient_norm_before_step() if want_norm else None
        self._engine.step()
        if not self._checked_step:
            self.optimizer.check_table(step, "after the first step")
            self._checked_step = True
        if not want_norm:
            return None
        return norm if norm is not None else self.partitions.gradient_norm()

    def restored(self, step: int) -> None:
        """Say that a checkpoint was loaded: learning rates come from the config, never from the checkpoint."""
        self.optimizer.apply(step)
        self.optimizer.check_table(step, "after resume")
        self._checked_step = False

    def evaluation(self) -> _Evaluation:
        """``with engine.evaluation() as module:`` the model in eval mode without gradients."""
        return _Evaluation(self._engine)


class _Evaluation:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._no_grad = torch.no_grad()

    def __enter__(self) -> nn.Module:
        self._engine.eval()
        self._no_grad.__enter__()
        return self._engine.module

    def __exit__(self, *exc: Any) -> None:
        self._no_grad.__exit__(*exc)
        self._engine.train()
