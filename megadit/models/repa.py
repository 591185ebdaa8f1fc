"""REPA's projector (Yu et al., arXiv 2410.06940): from a block's image tokens to a pretrained encoder's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from megadit.config.schema.model import RepaConfig
from megadit.models.layers import MuRMSNorm, ReplicatedLinear
from megadit.mup.rules import InitRule, Parametrization
from megadit.mup.spec import Dim

# The cosine's gradient is divided by the projection's norm, so that it would grow with width as products of a random
# readout shrink (m^-1/2). Products of a tenth beside a bias of std .58 keep the norm, and so the gradient, constant.
_BESIDE_BIAS = InitRule("fan_in", 0.1)
_BIAS = InitRule("kaiming_uniform")

PREFIX = "repa."  # of the projector's parameter names in a model

T = TypeVar("T")


def without_projector(named: Mapping[str, T]) -> dict[str, T]:
    """The entries of all parameters but the projector's, which only training needs and no other program has."""
    return {name: value for name, value in named.items() if not name.startswith(PREFIX)}


class RepaProjector(nn.Module):
    """Three linears with SiLU between them: tokens (B, T, n) -> (B, T, F), float in the weights' dtype.

    The hidden width is fixed while the model's grows. So under muP the first linear is a readout, multiplier 1/m and
    learning rate eta, but initialised at random, since a zero projection has no direction. Its products start as
    m^-1/2, so its bias is random too, of a std that does not depend on the width. The other two linears are finite.
    With ``norm`` an RMSNorm follows the first linear.
    """

    def __init__(self, repa: RepaConfig, param: Parametrization) -> None:
        super().__init__()
        hidden = Dim(repa.hidden)
        self.fc1 = ReplicatedLinear(param.width_dim(), hidden, param, init=_BESIDE_BIAS, bias_init=_BIAS)
        self.norm = MuRMSNorm(hidden, param) if repa.norm == "rms" else None
        self.fc2 = ReplicatedLinear(hidden, hidden, param)
        self.fc3 = ReplicatedLinear(hidden, Dim(repa.feature_dim), param)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project each token, (B, T, n) -> (B, T, F)."""
        hidden = self.fc1(tokens)
        if self.norm is not None:
            hidden = self.norm(hidden)
        projected: Tensor = self.fc3(F.silu(self.fc2(F.silu(hidden))))
        return projected
