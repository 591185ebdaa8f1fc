"""Checks of ``sample.*`` against the objective and the model, without importing the samplers."""

from __future__ import annotations

from megadit.config.schema.run import ObjectiveConfig, RunConfig, SampleConfig
from megadit.errors import UserError

# Samplers by objective.kind, the default first; megadit/diffusion/sampling/schedulers.py builds them.
_KINDS = {"ddpm": ("dpm", "ddpm", "ddim"), "flow": ("euler",)}


def scheduler_name(objective: ObjectiveConfig, config: SampleConfig) -> str:
    """``sample.scheduler`` with ``auto`` resolved. Raises UserError if the sampler is not one of this objective's."""
    known = _KINDS[objective.kind]
    if config.scheduler == "auto":
        return known[0]
    if config.scheduler not in known:
        raise UserError(
            f"sample.scheduler: {config.scheduler} does not sample models of objective.kind {objective.kind}; "
            f"use {' or '.join(known)}"
        )
    return config.scheduler


def ends_at_zero(scheduler: str) -> bool:
    """Whether the sampler's last step is training step 0; the multistep solver stops one interval before it.

    That solver extrapolates in log SNR, and that of step 0 is far from the others.
    """
    return scheduler != "dpm"


def check_steps(total: int, count: int, *, down_to_zero: bool) -> None:
    """Raise UserError where ``count`` evenly spaced steps do not fit into ``total`` training steps."""
    most = total if down_to_zero else total - 1
    if count > most:
        raise UserError(f"sample.steps: {count} is more than this sampler and the model's schedule have; use {most}")


def check_sampling(config: RunConfig) -> None:
    """Raise UserError where ``sample.*`` does not fit the model, before training and not at the first sampling."""
    name = scheduler_name(config.objective, config.sample)
    if config.objective.kind == "ddpm":
        check_steps(config.objective.diffusion_steps, config.sample.steps, down_to_zero=ends_at_zero(name))
    conditional = config.model.num_classes > 0 or config.model.text is not None
    if config.sample.guidance != 1.0 and not (conditional and config.objective.label_dropout > 0):
        raise UserError(needs_null(config.sample.guidance))


def needs_null(guidance: float) -> str:
    """The sentence for guidance of a model that was not trained with dropped conditions."""
    return (
        f"sample.guidance: {guidance:g} needs a model trained with and without conditions "
        "(classes or texts, and objective.label_dropout above 0); set sample.guidance=1"
    )
