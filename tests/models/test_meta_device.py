"""A model under ``torch.device("meta")`` takes no memory, whatever its size; given memory, it starts as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadit.config import load_config
from megadit.models import build_model, count_parameters
from megadit.mup.init import init_parameters

QUICKSTARTS = ("digits", "emoji-uvit", "emoji-pixart", "emoji-mmdit-repa")


class Allocations(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation makes outside of the meta device."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return out


def devices(model: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("name", [f"quickstart/{name}.yaml" for name in QUICKSTARTS])
def test_the_context_allocates_nothing_and_the_start_stays(name: str) -> None:
    config = load_config(name).model
    with Allocations() as allocations, torch.device("meta"):
        model = build_model(config)
    assert allocations.largest == 0 and devices(model) == {"meta"}
    model.to_empty(device="cpu")
    init_parameters(model, 3)
    plain = build_model(config, seed=3).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


def test_18_billion_parameters() -> None:
    config = load_config("mmdit/18b-mup.yaml").model
    with Allocations() as allocations:
        with torch.device("meta"):
            model = build_model(config)
        assert count_parameters(config) > 18e9
    assert allocations.largest == 0 and devices(model) == {"meta"}


def test_a_device_that_is_given_holds_inside_another() -> None:
    config = load_config("quickstart/digits.yaml").model
    with torch.device("meta"):
        model = build_model(config, device="cpu")
    plain = build_model(config).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
