"""Gradient norms by role, as DeepSpeed's step computes them (see ``zero_stages``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megadit.engine.clipping import ClipPlan
from megadit.engine.deepspeed.guard import UpdateGuard
from megadit.mup.spec import Role


class RoleNorms:
    """L2 norms of the last step's gradients by role: reduced over the ranks, before clipping."""

    def __init__(self, plan: ClipPlan, guard: UpdateGuard) -> None:
        self._roles, self._guard = plan.roles, guard
        self._norms: dict[Role, Tensor] = {}  # each (), times the loss scale
        self._scale = 1.0

    def clear(self) -> None:
        """Forget those of the step before."""
        self._norms = {}

    def record(self, norms: Mapping[Role, Tensor], scale: float = 1.0) -> None:
        """The norms of this step, each a tensor () and ``scale`` times too large."""
        self._norms, self._scale = dict(norms), scale
        self._guard.record_norms(self._norms)

    def record_buffers(self, norms: Sequence[Tensor], roles: Sequence[Role], scale: float) -> None:
        """As ``record``, by buffer: several may have the same role."""
        by_role: dict[Role, list[Tensor]] = {}
        for role, norm in zip(roles, norms, strict=True):
            by_role.setdefault(role, []).append(norm)
        self.record({role: _combined(parts) for role, parts in by_role.items()}, scale)

    def of(self, role: Role) -> Tensor:
        """The recorded norm of a role, ()."""
        return self._norms[role]

    def values(self) -> dict[Role, float]:
        """The norms without the loss scale; infinite where a gradient was not finite, and all of a skipped update."""
        if not self._norms:
            return dict.fromkeys(self._roles, math.inf)
        norms = {role: float(norm) / self._scale for role, norm in self._norms.items()}
        return {role: norm if math.isfinite(norm) and norm >= 0 else math.inf for role, norm in norms.items()}

    def total(self) -> float:
        """The norm over all roles, as ``values`` gives them."""
        return math.hypot(*self.values().values())


def _combined(norms: Sequence[Tensor]) -> Tensor:
    """The norm over several buffers, -1 (DeepSpeed's sign of one that is not finite) if one of theirs is."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack([norm.to(norms[0].device).double() for norm in norms])
    total = stacked.square().sum().sqrt().to(norms[0].dtype)
    return torch.where((stacked < 0).any(), -torch.ones_like(total), total)
