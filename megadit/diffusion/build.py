"""From ``objective.*`` of the configuration to an ``Objective``."""

from __future__ import annotations

from megadit.conditioning import Conditioning, null_label
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion.ddpm import DDPMObjective
from megadit.diffusion.flow import FlowObjective
from megadit.diffusion.objective import Objective


def build_objective(
    config: ObjectiveConfig, *, learn_sigma: bool, num_classes: int = 0, null: Conditioning | None = None
) -> Objective:
    """The objective for a model with these outputs and conditions. Raises UserError if they do not go together.

    null: the null conditions, a batch of one; by default the null label ``num_classes`` where there are classes.
    """
    kinds = {"ddpm": DDPMObjective, "flow": FlowObjective}
    return kinds[config.kind](config, learn_sigma=learn_sigma, null=null or null_label(num_classes))
