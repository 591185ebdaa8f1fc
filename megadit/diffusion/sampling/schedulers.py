"""Samplers: a diffusers scheduler, its timesteps, and the model time of each.

The timesteps are set explicitly. diffusers' own spacings end at the wrong step (DDIM rounds T / steps down), add a
nearly empty last step at sigma = 1/1000 (flow), or shift a flow's last sigma twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megadit.config.schema.run import ObjectiveConfig, SampleConfig
from megadit.config.schema.sampling import check_steps, ends_at_zero, scheduler_name
from megadit.diffusion.objectives.ddpm import schedule_betas
from megadit.diffusion.objectives.objective import MODEL_TIME
from megadit.optional import import_diffusers


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler with its timesteps set, and the model times.

    times: the timestep argument of ``scheduler.step``, one entry per step, on the CPU.  model_times: the model's t at
    each step, in [0, 1000].  uses_variance: whether ``scheduler.step`` takes the learned variance.
    """

    scheduler: Any
    times: Tensor
    model_times: tuple[float, ...]
    uses_variance: bool


def build_sampler(objective: ObjectiveConfig, config: SampleConfig, *, learn_sigma: bool) -> Sampler:
    """The sampler of ``config`` for a model trained with ``objective``. Raises UserError where they do not fit."""
    name = scheduler_name(objective, config)
    if objective.kind == "flow":
        return _flow_sampler(objective, config)
    return _ddpm_sampler(name, objective, config, learn_sigma)


def spaced_steps(total: int, count: int, *, down_to_zero: bool = True) -> list[int]:
    """``count`` of ``total`` training steps, evenly spaced and descending from total - 1.

    They end at step 0, as in DiT's respacing, or one interval before it. A single step is total - 1. Raises UserError
    where ``total`` is too small.
    """
    check_steps(total, count, down_to_zero=down_to_zero)
    intervals = count - 1 if down_to_zero else count
    points = np.linspace(total - 1, 0, max(intervals, 1) + 1).round()
    return [int(step) for step in points[:count]]


def _ddpm_sampler(name: str, objective: ObjectiveConfig, config: SampleConfig, learn_sigma: bool) -> Sampler:
    diffusers = import_diffusers()
    total = objective.diffusion_steps
    common = {
        "num_train_timesteps": total,
        "trained_betas": schedule_betas(objective.beta_schedule, total).numpy(),
        "prediction_type": "epsilon" if objective.prediction == "eps" else "v_prediction",
    }
    if name == "ddpm":
        variance = "learned_range" if learn_sigma else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**common, variance_type=variance, clip_sample=False)
    else:
        # DPM-Solver++ of order 1 is DDIM (Lu et al. 2022, section 4), with exact last steps.
        order = 1 if name == "ddim" else 2
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, solver_order=order, algorithm_type="dpmsolver++")
    steps = spaced_steps(total, config.steps, down_to_zero=ends_at_zero(name))
    scheduler.set_timesteps(timesteps=steps)
    return Sampler(
        scheduler=scheduler,
        times=scheduler.timesteps,
        model_times=tuple(step * MODEL_TIME / total for step in steps),
        uses_variance=learn_sigma and name == "ddpm",
    )


def _flow_sampler(objective: ObjectiveConfig, config: SampleConfig) -> Sampler:
    diffusers = import_diffusers()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(MODEL_TIME), shift=objective.shift)
    # Unshifted and evenly spaced from pure noise; the scheduler shifts them once and appends the final 0.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / config.steps, config.steps).tolist())
    times = scheduler.timesteps
    return Sampler(scheduler=scheduler, times=times, model_times=tuple(times.tolist()), uses_variance=False)
