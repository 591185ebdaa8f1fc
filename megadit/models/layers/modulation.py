"""The linear that turns the condition vector into shifts, scales and gates."""

from __future__ import annotations

from torch import nn

from megadit.models.layers.linear import MuLinear
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim


def adaln_modulation(width: Dim, chunks: int, param: Parametrization) -> nn.Sequential:
    """Linear(n -> chunks * n) on SiLU(c). The SiLU is taken once for all blocks; its place keeps the name ``.1``.

    Tensor-parallel ranks share out its 6 n^2 elements, a third of a block's, and gather the result, one row a sample.
    All blocks have one c, so that it comes by ``enter_blocks``.
    """
    out = Dim(chunks * width.size, chunks * width.base_size)
    linear = MuLinear(width, out, param, init="adaln", shard="column", gather=True, entered=True)
    return nn.Sequential(nn.Identity(), linear)
