"""adaLN: the linear from the condition to shifts, scales and gates, and the modulated final layer."""

from __future__ import annotations

from torch import Tensor, nn

from megadit.models.layers.linear import ColumnParallelLinear, ReplicatedLinear
from megadit.models.layers.norm import ModulatedNorm, PendingResidual, Precision
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim


def adaln_modulation(width: Dim, chunks: int, param: Parametrization) -> nn.Sequential:
    """Linear(n -> chunks * n) on SiLU(c), which is computed once for all blocks; an identity keeps the name ``.1``.

    Its 6 n^2 elements, a third of a block's, are sharded by tensor parallelism, and its output, one row per sample, is
    all-gathered. All blocks share the input, so it must come by ``shared_block_input``.
    """
    out = Dim(chunks * width.size, chunks * width.base_size)
    linear = ColumnParallelLinear(width, out, param, init="adaln", gather_output=True, skip_input_grad_reduce=True)
    linear.per_token = False
    return nn.Sequential(nn.Identity(), linear)


class AdaLNReadout(nn.Module):
    """Norm, modulate and read out: (B, T, n), SiLU(c) (B, n) -> (B, T, out); ``tokens``: see ``MuLinear``."""

    def __init__(
        self, width: Dim, out: int, param: Parametrization, eps: float, precision: Precision, tokens: int
    ) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(width, Dim(out), param, init="readout", tokens=tokens)
        self.norm = ModulatedNorm(eps, precision)
        self.adaLN_modulation = adaln_modulation(width, 2, param)

    def forward(self, x: Tensor, c: Tensor, pending: PendingResidual = ()) -> Tensor:
        """Modulation order: shift, scale. ``pending``: of the last block, added to x first."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        _, normed = self.norm.of_stream(x, pending, shift, scale)
        return self.linear(normed)
