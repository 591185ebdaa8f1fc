"""The feed-forward half of a block."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from megadit.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit_kernels import bias_gelu, swiglu

Activation = Literal["gelu_tanh", "gelu", "swiglu"]


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``; for swiglu fc1 puts out [gate, up], 2 x hidden, and ``act`` is SiLU(gate) * up.

    Tensor parallelism shards the hidden channels, gate and up alike; ``tokens``: see ``MuLinear``.
    """

    def __init__(
        self,
        width: Dim,
        hidden: Dim,
        param: Parametrization,
        activation: Activation = "gelu_tanh",
        *,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        fan_out = Dim(2 * hidden.size, 2 * hidden.base_size) if activation == "swiglu" else hidden
        parts = 2 if activation == "swiglu" else 1
        self.fc1 = ColumnParallelLinear(width, fan_out, param, parts=parts, tokens=tokens)
        self.fc2 = RowParallelLinear(hidden, width, param, tokens=tokens)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, n) -> (B, T, n)."""
        if self.activation == "swiglu":
            return self.fc2(self.fc1(x, swiglu))
        return self.fc2(self.fc1(x, bias_gelu, approximate="tanh" if self.activation == "gelu_tanh" else "none"))
