"""Gradient clipping by role: thresholds of gradient norms.

``optim.clip.mode: global`` (the paper's) is DeepSpeed's own clipping by the norm over all parameters. ``per_group``
clips the gradient of each role (input, hidden, vector, output, finite) by its own norm: the base threshold times the
role's ``clip_mult``, so that clipping acts alike at every width. The unit is the role and not the optimizer's group:
whether tables are decayed, or an mlp_ratio splits a role, must not change what is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megadit.config.schema.optim import ClipConfig
from megadit.mup.spec import Role


@dataclass(frozen=True)
class ClipPlan:
    """roles: of the optimizer groups, in their order.  limits: thresholds by role, None for global clipping.

    A role that is not in ``limits`` is not clipped.
    """

    roles: tuple[Role, ...]
    limits: Mapping[Role, float] | None = None


def clip_plan(roles: tuple[Role, ...], clip_mults: Mapping[Role, float], config: ClipConfig) -> ClipPlan:
    """The plan of a model whose optimizer groups have ``roles`` and whose roles scale by ``clip_mults``."""
    if config.mode == "global":
        return ClipPlan(roles)
    bases = {role: getattr(config.groups, role) or config.value for role in clip_mults}
    return ClipPlan(roles, {role: base * clip_mults[role] for role, base in bases.items() if base is not None})
