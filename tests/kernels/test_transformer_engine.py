"""te.Linear as a layer's products: the calls that are made of it, by a stand-in of its signature, and its own on a GPU.

The stand-in has the names and parameters of transformer-engine 2 (``te.Linear``, ``te.autocast``, ``common.recipe``).
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.weights import randomize
from megadit.config.schema.float8 import Float8Config
from megadit.models import build_model
from megadit.models.float8 import set_float8
from megadit_kernels import backends, scaled_linear
from megadit_kernels.float8 import Float8Products, TransformerEngineProducts
from megadit_kernels.float8 import transformer_engine as module


class Recipe:
    def __init__(self, **options: Any) -> None:
        self.options = options


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class StandIn:
    """Modules ``transformer_engine.pytorch`` and ``.common.recipe``. calls: shapes and recipes of forward passes."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], Any]] = []
        self.recipe: Any = None
        stand_in = self

        class Linear(nn.Module):
            def __init__(
                self,
                in_features: int,
                out_features: int,
                sequence_parallel: bool = False,
                fuse_wgrad_accumulation: bool = False,
                tp_group: Any = None,
                tp_size: int = 1,
                get_rng_state_tracker: Any = None,
                init_method: Any = None,
                bias: bool = True,
                return_bias: bool = False,
                params_dtype: torch.dtype | None = None,
                parallel_mode: str | None = None,
                parameters_split: Any = None,
                device: torch.device | str = "cuda",
            ) -> None:
                super().__init__()
                assert params_dtype is not None and str(device) == "meta"
                self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
                if bias:
                    self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
                else:
                    self.bias = torch.Tensor().to(dtype=params_dtype, device=device)

            def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Tensor:
                assert stand_in.recipe is not None, "outside of autocast"
                assert inp.shape[0] % 8 == 0 and inp.shape[1] % 16 == 0 and self.weight.shape[0] % 16 == 0
                stand_in.calls.append((tuple(inp.shape), stand_in.recipe))
                own_bias = self.bias if isinstance(self.bias, nn.Parameter) else None
                return Float8Products("tensor").linear(inp, self.weight, own_bias, 1.0)

        @contextmanager
        def autocast(
            enabled: bool = True,
            calibrating: bool = False,
            recipe: Any = None,
            amax_reduction_group: Any = None,
            _graph: bool = False,
        ) -> Iterator[None]:
            assert enabled and not calibrating
            stand_in.recipe, before = recipe, stand_in.recipe
            yield
            stand_in.recipe = before

        self.pytorch = types.ModuleType("transformer_engine.pytorch")
        self.pytorch.Linear, self.pytorch.autocast = Linear, autocast  # type: ignore[attr-defined]
        self.common = types.ModuleType("transformer_engine.common.recipe")
        for name, value in (
            ("Float8CurrentScaling", Float8CurrentScaling),
            ("Float8BlockScaling", Float8BlockScaling),
            ("Format", types.SimpleNamespace(HYBRID="hybrid", E4M3="e4m3")),
        ):
            setattr(self.common, name, value)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", made.pytorch)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", made.common)
    module._recipe.cache_clear()
    yield made
    module._recipe.cache_clear()


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("tokens", [8, 5])
def test_the_layers_own_parameters_are_multiplied(stand_in: StandIn, tokens: int, alpha: float) -> None:
    """Rows are padded to a multiple of 8; with a multiplier, and gradients of input, weight and bias."""
    x = torch.randn(2, tokens, 32, requires_grad=True)
    weight, bias = nn.Parameter(torch.randn(48, 32)), nn.Parameter(torch.randn(48))
    products = TransformerEngineProducts("tensor")
    ours = gradients(products.linear(x, weight, bias, alpha), x, weight, bias)
    expected = gradients(Float8Products("tensor").linear(x, weight, bias, alpha), x, weight, bias)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    [(shape, recipe)] = stand_in.calls
    assert shape == (2 * tokens + -2 * tokens % 8, 32)
    assert isinstance(recipe, Float8CurrentScaling) and recipe.options == {"fp8_format": "hybrid"}


def test_blocks_of_a_weight_have_their_own_recipe(stand_in: StandIn) -> None:
    TransformerEngineProducts("block").linear(torch.randn(8, 32), nn.Parameter(torch.randn(16, 32)), None, 1.0)
    [(_, recipe)] = stand_in.calls
    assert isinstance(recipe, Float8BlockScaling)


@pytest.mark.parametrize("shape", [(0, 32, 48), (8, 36, 48), (8, 32, 20)], ids=str)
def test_what_it_cannot_multiply_runs_in_the_layers_precision(stand_in: StandIn, shape: tuple[int, int, int]) -> None:
    tokens, n_in, n_out = shape
    x, weight = torch.randn(tokens, n_in), nn.Parameter(torch.randn(n_out, n_in))
    out = TransformerEngineProducts("tensor").linear(x, weight, None, 0.5)
    assert stand_in.calls == [] and torch.equal(out, scaled_linear(x, weight, None, 0.5))


def test_a_model_trains_by_it_and_keeps_its_parameters(stand_in: StandIn) -> None:
    config = tiny_dit(width=64, heads=4)
    results = []
    for fp8 in (Float8Config(), Float8Config(backend="transformer-engine")):
        model = build_model(config)
        randomize(model)
        names = list(model.state_dict())
        count = set_float8(model, fp8)
        assert count == 8
        model(*dit_inputs(config)).square().mean().backward()
        assert list(model.state_dict()) == names
        results.append([p.grad.flatten() for p in model.parameters()])
    assert len(stand_in.calls) == 8
    torch.testing.assert_close(torch.cat(results[1]), torch.cat(results[0]), rtol=1e-3, atol=1e-4)
    other = copy.deepcopy(model)  # has parameters, and te.Linear's, of its own
    model.zero_grad()
    other(*dit_inputs(config)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_real_one(alpha: float) -> None:
    probe = backends.backend("transformer-engine")
    if not probe.works or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"transformer-engine: {probe.detail}")
    x = torch.randn(2, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(48, 64, device="cuda", dtype=torch.bfloat16))
    bias = nn.Parameter(torch.randn(48, device="cuda", dtype=torch.bfloat16))
    ours = gradients(TransformerEngineProducts("tensor").linear(x, weight, bias, alpha), x, weight, bias)
    expected = gradients(F.linear(x * alpha, weight, bias), x, weight, bias)
    for one, other in zip(ours, expected, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) < 0.1
