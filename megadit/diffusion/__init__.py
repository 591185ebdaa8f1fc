"""What the network predicts while training, and how pictures are drawn from it."""

from megadit.diffusion.build import build_objective
from megadit.diffusion.objective import LossTerms, NoisyBatch, Objective

__all__ = ["LossTerms", "NoisyBatch", "Objective", "build_objective"]
