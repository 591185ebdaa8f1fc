"""Linear layers by transformer-engine's ``te.Linear`` with an FP8 recipe, on the weights of the layer it serves."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from megadit_kernels.linear import LinearProducts, scaled_linear

_MULTIPLE, _ROWS = 16, 8  # that te.Linear asks of channels and of rows in FP8


@dataclass(eq=False)
class TransformerEngineProducts(LinearProducts):
    """``LinearProducts`` of one layer on one tensor-parallel rank: ``linear`` alone, which has its own backward pass.

    scaling: tensor: ``Float8CurrentScaling``, e4m3 forward and e5m2 gradients; block: ``Float8BlockScaling``, e4m3.
    Both scale by present magnitudes and keep nothing between steps. te.Linear has no factor on its product: a
    multiplier other than 1 costs a pass over x. The blocks of a muP model have none by default.
    """

    scaling: Literal["tensor", "block"]
    _layer: Any = field(default=None, init=False, repr=False)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
        """See ``LinearProducts.linear``. Rows are padded; channels in other multiples than of 16 run in bf16."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0 or weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            return scaled_linear(x, weight, bias, alpha)
        missing = -rows.shape[0] % _ROWS
        if alpha != 1.0:
            rows = rows * alpha
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))
        te = importlib.import_module("transformer_engine.pytorch")
        with te.autocast(enabled=True, recipe=_recipe(self.scaling)):
            out: Tensor = self._module(te, weight, bias)(rows)
        return out.narrow(0, 0, out.shape[0] - missing).view(*x.shape[:-1], -1)

    def _module(self, te: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """te.Linear whose parameters are ``weight`` and ``bias`` themselves; made once, and no part of the model."""
        if self._layer is None:
            n_out, n_in = weight.shape
            self._layer = te.Linear(n_in, n_out, bias=bias is not None, params_dtype=weight.dtype, device="meta")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and getattr(self._layer, name) is not tensor:
                setattr(self._layer, name, tensor)
        layer: nn.Module = self._layer
        return layer

    def __deepcopy__(self, _memo: Any) -> TransformerEngineProducts:
        return TransformerEngineProducts(self.scaling)  # the copied layer has other parameters


@functools.cache
def _recipe(scaling: str) -> Any:
    recipe = importlib.import_module("transformer_engine.common.recipe")
    if scaling == "block":
        return recipe.Float8BlockScaling()
    return recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)
