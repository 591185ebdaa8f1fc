"""From ``objective.*`` of the configuration to an ``Objective``."""

from __future__ import annotations

from megadit.config.run import ObjectiveConfig
from megadit.diffusion.ddpm import DDPMObjective
from megadit.diffusion.flow import FlowObjective
from megadit.diffusion.objective import Objective


def build_objective(config: ObjectiveConfig, *, learn_sigma: bool, num_classes: int) -> Objective:
    """The objective for a model with these outputs and classes. Raises UserError if they do not go together."""
    kinds = {"ddpm": DDPMObjective, "flow": FlowObjective}
    return kinds[config.kind](config, learn_sigma=learn_sigma, num_classes=num_classes)
