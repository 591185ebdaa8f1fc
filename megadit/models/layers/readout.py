"""The final layer of families with adaLN: norm, the sample's own modulation, and the readout of the patches."""

from __future__ import annotations

from torch import Tensor, nn

from megadit.models.layers.linear import MuLinear
from megadit.models.layers.modulation import adaln_modulation
from megadit.models.layers.norm import ModulatedNorm, Precision
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim


class AdaLNReadout(nn.Module):
    """Norm, modulate and read out: (B, T, n), SiLU(c) (B, n) -> (B, T, out); ``tokens``, c: as in a block."""

    def __init__(
        self, width: Dim, out: int, param: Parametrization, eps: float, precision: Precision, tokens: int
    ) -> None:
        super().__init__()
        self.linear = MuLinear(width, Dim(out), param, init="readout", tokens=tokens)
        self.norm = ModulatedNorm(eps, precision)
        self.adaLN_modulation = adaln_modulation(width, 2, param)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Modulation order: shift, scale."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(self.norm(x, shift, scale))
