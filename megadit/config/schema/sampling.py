"""Which samplers suit which objective, and how many steps they have: checked without the libraries that draw."""

from __future__ import annotations

from megadit.config.schema.run import ObjectiveConfig, RunConfig, SampleConfig
from megadit.errors import UserError

# objective.kind: its samplers, the default first. Each is one of diffusers (megadit/diffusion/sampling/schedulers.py).
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
    """Whether a sampler's last step is training step 0; the multistep solver stops one interval short of it.

    It extrapolates, and the log SNR of step 0 lies far from that of the others.
    """
    return scheduler != "dpm"


def check_steps(total: int, count: int, *, down_to_zero: bool) -> None:
    """Raise UserError if a schedule of ``total`` training steps has no ``count`` steps, evenly spaced, to sample at."""
    most = total if down_to_zero else total - 1
    if count > most:
        raise UserError(f"sample.steps: {count} is more than this sampler and the model's schedule have; use {most}")


def check_sampling(config: RunConfig) -> None:
    """Raise UserError where ``sample.*`` does not suit the model, as drawing would after the training."""
    name = scheduler_name(config.objective, config.sample)
    if config.objective.kind == "ddpm":
        check_steps(config.objective.diffusion_steps, config.sample.steps, down_to_zero=ends_at_zero(name))
    conditional = config.model.num_classes > 0 or config.model.text is not None
    if config.sample.guidance != 1.0 and not (conditional and config.objective.label_dropout > 0):
        raise UserError(needs_null(config.sample.guidance))


def needs_null(guidance: float) -> str:
    """The sentence for guidance of a model that was not trained without conditions, too."""
    return (
        f"sample.guidance: {guidance:g} needs a model trained with and without conditions "
        "(classes or texts, and objective.label_dropout above 0); set sample.guidance=1"
    )
