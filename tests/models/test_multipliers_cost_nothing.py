"""muP's multipliers are arguments of the matrix products: no family has a pass over tokens for them.

Every operation that torch dispatches in a training pass is listed, of a model whose output multiplier is 1 and of one
whose is not: beside the products and their unused operands the lists are the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from megadit.models import build_model
from megadit.models.layers import linear
from megadit_kernels import linear as products
from megadit_kernels import scaled_linear

MODELS: dict[str, tuple[Any, Any]] = {
    "dit": (tiny_dit, dit_inputs),
    "pixart": (tiny_pixart, pixart_inputs),
    "mmdit": (tiny_mmdit, mmdit_inputs),
    "uvit": (functools.partial(tiny_uvit, "class"), uvit_inputs),
}
# The products, which differ in how they are called, and views, which move nothing.
_PRODUCTS = {"mm", "addmm", "linear"}
_VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "detach",
    "expand",
    "unsqueeze",
    "slice",
    "select",
    "as_strided",
}


class Passes(TorchDispatchMode):
    """Counts the operations by name and size of the result; a product's unused operand has one element."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            self.products += 1
        elif name not in _VIEWS and not (isinstance(out, Tensor) and out.numel() == 1 and name == "new_zeros"):
            self.others[name, out.numel() if isinstance(out, Tensor) else 0] += 1
        return out


def training_pass(family: str, precision: torch.dtype, **changes: Any) -> Passes:
    make, draw = MODELS[family]
    config = make(depth=2, mlp="swiglu", **changes)
    model = build_model(config).to(precision)
    assert {spec.forward_mult for spec in readout_specs(model)} == {changes.get("output_mult", 1.0)}
    x, *rest = draw(config)
    with Passes() as passes:
        model(x.to(precision), *rest).square().mean().backward()
    return passes


def readout_specs(model: torch.nn.Module) -> list[Any]:
    """Of the weight of the final layer, whatever the family calls it."""
    specs = [s for m in model.modules() if isinstance(m, linear.MuLinear) for s in (m.param_specs["weight"],)]
    return [spec for spec in specs if spec.role == "output"]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(MODELS))
def test_the_output_multiplier_is_part_of_the_readouts_product(family: str, precision: torch.dtype) -> None:
    plain, multiplied = (training_pass(family, precision, **changes) for changes in ({}, {"output_mult": 0.375}))
    assert multiplied.products == plain.products
    assert multiplied.others == plain.others


def test_a_multiplier_in_a_pass_of_its_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = training_pass("dit", torch.float32)
    monkeypatch.setattr(products, "scaled_linear", scaled_linear.reference)
    assert training_pass("dit", torch.float32, output_mult=0.375).others != plain.others
