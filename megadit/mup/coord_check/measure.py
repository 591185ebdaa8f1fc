"""Coordinate check: does every module's coordinate size stay put as the width grows, at the start and in training?

Under muP activations and their updates are Theta(1) in width (arXiv 2203.03466 appendix D.1, arXiv 2505.15270);
a wrong multiplier, init or learning rate shows within a few steps as a slope of log size against log width.
All widths see the same keyed batches, noise and times. Learning rates are those of the config's peak, without
warm-up, clipping or weight decay, which would hide what is looked for, and Adam's epsilon is next to nothing:
behind zero gates and a zero readout the first gradients lie below any usual one, which is not the rules' fault.

Everything is computed in float64, and gradients that are rounding beside others of their tensor are zero: Adam at that
epsilon makes a key bias's, whose gradient is rounding alone, as large as any other. So the last bits of a machine's
matrix products decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.optim import OptimConfig
from megadit.mup.coord_check.plan import CoordPlan, at_width
from megadit.mup.coord_check.record import CoordMeasurement, Recorder
from megadit.mup.example import example_conditioning, example_features, example_images
from megadit.mup.groups import param_groups

_EPS = 1e-20  # small against any gradient that matters, large against the root of float32's smallest square
_ROUNDING = 2.0**-40  # of a tensor's largest gradient: far above float64's rounding, far below what moves anything
_PROBE = 1 << 40  # sample numbers of the probe: far from those that are trained on


class TrainingObjective(Protocol):
    """The two calls of ``megadit.diffusion.Objective`` that a training step makes."""

    def prepare(self, x0: Tensor, cond: Conditioning, numbers: Tensor, seed: int) -> Any: ...

    def loss(self, output: Tensor, noisy: Any) -> Any: ...


Build = Callable[[ModelConfig, int], nn.Module]
Alignment = Callable[[Tensor, Tensor], Tensor]


def measure_coordinates(
    model: ModelConfig,
    optim: OptimConfig,
    plan: CoordPlan,
    *,
    build: Build,
    objective: TrainingObjective,
    parametrization: str | None = None,
    alignment: Alignment | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[CoordMeasurement]:
    """Train one model per width and seed on keyed normal images and read its coordinates after every step.

    ``build(config, seed)`` makes an initialised model, which is trained in float64; ``parametrization`` overrides the
    config's. ``alignment`` maps projected tokens and target features, (B, T, F) each, to the REPA loss (B,), weight
    included; a model with a projector needs it, and others do without.
    """
    if (model.repa is None) != (alignment is None):
        raise ValueError("alignment: belongs to a model with a REPA projector, and to no other")
    measurements: list[CoordMeasurement] = []
    for width in sorted(set(plan.widths)):
        config = at_width(model, width, parametrization or model.parametrization, plan.widths)
        for seed in range(plan.seeds):
            progress(f"width {width}, seed {seed}: {plan.steps} steps")
            trainer = _CoordTrainer(build(config, seed).double(), config, optim, plan, objective, alignment)
            measurements += trainer.train(seed)
    return measurements


@dataclass(frozen=True)
class _CoordTrainer:
    """One model of the check, its data and its losses."""

    model: nn.Module
    config: ModelConfig
    optim: OptimConfig
    plan: CoordPlan
    objective: TrainingObjective
    alignment: Alignment | None

    def train(self, seed: int) -> list[CoordMeasurement]:
        """Train, and read before the first step and after every one."""
        groups = [{**group, "eps": _EPS, "weight_decay": 0.0} for group in param_groups(self.model, self.optim)]
        optimizer = torch.optim.AdamW(groups, betas=self.optim.betas)
        size = self.plan.batch
        probe = _noisy(self.config, self.objective, range(_PROBE, _PROBE + size))
        recorder = Recorder(self.model, lambda: self._run(probe)[0], self.config.width, seed)
        recorder.record(0)
        for step in range(self.plan.steps):
            optimizer.zero_grad(set_to_none=True)
            self._loss(range(step * size, (step + 1) * size), recorder, step).backward()
            _drop_rounding(self.model)
            optimizer.step()
            recorder.record(step + 1)
        return recorder.measurements

    def _loss(self, numbers: range, recorder: Recorder, step: int) -> Tensor:
        """The loss of these samples; what REPA's part of it asks of its block is read on the way."""
        noisy = _noisy(self.config, self.objective, numbers)
        output, projected, tokens = self._run(noisy)
        loss: Tensor = self.objective.loss(output, noisy).total.mean()
        if self.alignment is None:
            return loss
        repa = self.alignment(projected, example_features(self.config, numbers)).mean()
        (pull,) = torch.autograd.grad(repa, tokens, retain_graph=True)
        recorder.record_pull(step, pull)
        return loss + repa

    def _run(self, noisy: Any) -> tuple[Tensor, Any, Any]:
        """(output, projected tokens, the tokens that were projected); the last two None without a projector."""
        if self.alignment is None:
            return self.model(noisy.x, noisy.t, noisy.cond), None, None
        tokens: list[Tensor] = []
        handle = self.model.get_submodule("repa").register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
        try:
            output, projected = self.model(noisy.x, noisy.t, noisy.cond, project=True)
        finally:
            handle.remove()
        return output, projected, tokens[0]


def _drop_rounding(model: nn.Module) -> None:
    """Zero the gradients that are rounding beside the largest of their tensor."""
    for param in model.parameters():
        if param.grad is not None:
            size = param.grad.abs()
            param.grad.masked_fill_(size <= _ROUNDING * size.max(), 0.0)


def _noisy(config: ModelConfig, objective: TrainingObjective, numbers: range) -> Any:
    """The noisy batch of these sample numbers, with example conditions: the same for every width and seed."""
    ids = torch.tensor(list(numbers), dtype=torch.int64)
    return objective.prepare(example_images(config, numbers), example_conditioning(config, numbers), ids, 0)
