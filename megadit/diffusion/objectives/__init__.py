"""Training objectives: DDPM (noise or v), flow matching, and the REPA loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megadit.conditioning import Conditioning
    from megadit.config.schema.run import ObjectiveConfig
    from megadit.diffusion.objectives.objective import Objective


def build_objective(
    config: ObjectiveConfig, *, learn_sigma: bool, num_classes: int = 0, null: Conditioning | None = None
) -> Objective:
    """The objective of ``objective.kind``. Raises UserError where the model's outputs do not fit it.

    null: the null conditions, a batch of one; by default the null label ``num_classes`` where there are classes.
    """
    from megadit.conditioning import null_label
    from megadit.diffusion.objectives.ddpm import DDPMObjective
    from megadit.diffusion.objectives.flow import FlowObjective

    kinds = {"ddpm": DDPMObjective, "flow": FlowObjective}
    return kinds[config.kind](config, learn_sigma=learn_sigma, null=null or null_label(num_classes))
