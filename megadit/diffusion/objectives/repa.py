"""REPA (Yu et al., arXiv 2410.06940): aligns a block's projected tokens with the features of a pretrained encoder.

The loss of a sample is the mean over its tokens of -cos(projected, target), in [-1, 1]; the optimum is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadit.diffusion.objectives.objective import LossTerms

_TINY = 1e-6  # norm below which the cosine, and its gradient, is taken as 0


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the negative cosine: two (B, T, F) of any float dtype -> float32 (B,).

    In float32 under autocast too: squares of half-precision features overflow. Raises ValueError if shapes differ.
    """
    if projected.shape != target.shape:
        raise ValueError(f"projected tokens {tuple(projected.shape)} and target features {tuple(target.shape)} differ")
    with torch.autocast(projected.device.type, enabled=False):
        return -(_directions(projected.float()) * _directions(target.float())).sum(-1).mean(-1)


def with_alignment(terms: LossTerms, projected: Tensor, target: Tensor, weight: float) -> LossTerms:
    """``terms`` with ``weight`` times the alignment loss added to the total, and the loss itself as ``repa``."""
    repa = alignment_loss(projected, target)
    return LossTerms(total=terms.total + weight * repa, terms={**terms.terms, "repa": repa})


def _directions(vectors: Tensor) -> Tensor:
    """Vectors along the last dimension, normalised to length 1; those below ``_TINY`` are 0 without a gradient."""
    squares = vectors.square().sum(-1, keepdim=True)
    return vectors * squares.clamp_min(_TINY**2).rsqrt() * (squares > _TINY**2)
