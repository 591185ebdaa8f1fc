"""Training objectives of diffusion models, and sampling from them."""

from typing import TYPE_CHECKING

from megadit.lazy import lazy_exports

if TYPE_CHECKING:
    from megadit.diffusion.objectives import build_objective
    from megadit.diffusion.objectives.objective import LossTerms, NoisyBatch, Objective

__all__ = ["LossTerms", "NoisyBatch", "Objective", "build_objective"]

_OBJECTIVE = dict.fromkeys(("LossTerms", "NoisyBatch", "Objective"), "objectives.objective")
__getattr__ = lazy_exports(__name__, {"build_objective": "objectives", **_OBJECTIVE})
