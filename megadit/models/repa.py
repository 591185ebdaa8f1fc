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

# The cosine divides by the size of what is projected, so that its pull on the block grows wherever that shrinks with
# width, as products of a random readout do (m^-1/2). Beside a bias of std .58 products of a tenth leave it in place.
_BESIDE_BIAS = InitRule("fan_in", 0.1)
_BIAS = InitRule("kaiming_uniform")

PREFIX = "repa."  # how the names of its parameters in a model begin

T = TypeVar("T")


def without_projector(named: Mapping[str, T]) -> dict[str, T]:
    """What belongs to all parameters but the projector's: it serves training alone, and no other program has it."""
    return {name: value for name, value in named.items() if not name.startswith(PREFIX)}


class RepaProjector(nn.Module):
    """Three linears with SiLU between them: tokens (B, T, n) -> (B, T, F), float in the weights' dtype.

    Its hidden width stays as the model's grows. So the first linear is a readout: multiplier 1/m, rate eta; but it
    starts at random, since a zero projection has no direction, and as its products then start as m^-1/2, its bias
    starts at random too, with a std that does not depend on the width. The other two are finite.
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
        """Project every token by itself."""
        hidden = self.fc1(tokens)
        if self.norm is not None:
            hidden = self.norm(hidden)
        projected: Tensor = self.fc3(F.silu(self.fc2(F.silu(hidden))))
        return projected
