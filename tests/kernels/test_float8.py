"""FP8 products against float64 of the quantised values: forward, gradients, multiplier, padding, recomputation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compiler import compiling
from megadit.parallel.recompute import run_block
from megadit_kernels import scaled_linear
from megadit_kernels.float8 import Float8Products
from megadit_kernels.float8 import products as products_module
from megadit_kernels.float8 import quantize as quantize_module
from megadit_kernels.float8.quantize import largest_magnitude, multiply, quantize, scale_of, scaled_mm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ["tensor", "row"]
# tokens, n_in, n_out: multiples of 16, shares of 288 at tensor 8 (36 channels), odd token counts, one token.
SHAPES = [(32, 64, 48), (35, 36, 108), (7, 288, 36), (1, 1152, 144), (130, 144, 288)]
ALPHA = 0.3


def drawn(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (2, tokens, n_in), weight, bias and a gradient of the output, with rows and channels of unlike sizes."""
    tokens, n_in, n_out = shape
    generator = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = normal(2, tokens, n_in) * normal(2, tokens, 1).exp() * normal(n_in).exp()
    grad = normal(2, tokens, n_out) * normal(2, tokens, 1).mul(2).exp() * 1e-6
    return x.to(dtype), (normal(n_out, n_in) * 0.02).to(dtype), normal(n_out).to(dtype), grad.to(dtype)


def in_float64(matrix: Tensor, dtype: torch.dtype, scaling: str) -> Tensor:
    """The values that a matrix (rows, k) has in FP8, computed with another formula: the power of two by frexp."""
    amax = matrix.double().abs().amax() if scaling == "tensor" else matrix.double().abs().amax(1, keepdim=True)
    fraction, exponent = torch.frexp(amax.clamp(min=2.0**-80) / torch.finfo(dtype).max)
    scale = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())
    return (matrix.double() / scale).float().to(dtype).double() * scale


def expected_of(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, alpha: float, scaling: str) -> dict[str, Tensor]:
    """Output and gradients in float64 of the quantised operands."""
    rows, grads = x.flatten(0, 1), grad.flatten(0, 1)
    of_grad = E5M2 if scaling == "tensor" else E4M3
    q = lambda matrix, dtype=E4M3: in_float64(matrix, dtype, scaling)  # noqa: E731
    out = alpha * (q(rows) @ q(weight).t()) + bias.double()
    return {
        "out": out.view(*x.shape[:-1], -1),
        "x": (alpha * (q(grads, of_grad) @ q(weight.t()).t())).view(x.shape),
        "weight": alpha * (q(grads.t(), of_grad) @ q(rows.t()).t()),
        "bias": grads.double().sum(0),
    }


def computed(products: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, alpha: float) -> dict[str, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = products.linear(*leaves, alpha)
    grads = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), "x": grads[0], "weight": grads[1], "bias": grads[2]}


def gaps(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest value."""
    return {
        name: float((actual[name].double() - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    }


@pytest.mark.parametrize("alpha", [1.0, ALPHA])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_those_of_the_quantised_values(scaling: Any, shape: tuple[int, int, int], alpha: float) -> None:
    operands = drawn(shape)
    actual = computed(Float8Products(scaling), *operands, alpha)
    assert max(gaps(actual, expected_of(*operands, alpha, scaling)).values()) < 2e-6


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, scaling: Any) -> None:
    x, weight, bias, grad = drawn((33, 48, 64), dtype)
    grad = grad * 1e3  # of float16's normal numbers
    actual = computed(Float8Products(scaling), x, weight, bias, grad, ALPHA)
    assert all(value.dtype == dtype for value in actual.values())
    expected = expected_of(x, weight, bias, grad, ALPHA, scaling)
    assert max(gaps(actual, expected).values()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_error_is_that_of_fp8(scaling: Any) -> None:
    """Against the layer that is not quantised: e4m3 has 3 bits of mantissa, e5m2 2."""
    operands = drawn((64, 256, 128))
    exact = computed(_Exact(), *operands, ALPHA)
    actual = computed(Float8Products(scaling), *operands, ALPHA)
    errors = {name: float((actual[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    assert 0.01 < errors["out"] < 0.06 and 0.01 < errors["x"] < 0.09 and 0.01 < errors["weight"] < 0.09
    assert errors["bias"] == 0


class _Exact:
    linear = staticmethod(scaled_linear)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("which", ["out", "x", "weight"])
def test_a_multiplier_left_out_is_seen(scaling: Any, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"out": 1, "x": 2, "weight": 3}
    count = Counter[str]()

    def without(*args: Any, alpha: float = 1.0, **options: Any) -> Tensor:
        count["calls"] += 1
        return multiply(*args, alpha=1.0 if count["calls"] == calls[which] else alpha, **options)

    monkeypatch.setattr(products_module, "multiply", without)
    operands = drawn((32, 48, 64))
    found = gaps(computed(Float8Products(scaling), *operands, ALPHA), expected_of(*operands, ALPHA, scaling))
    assert found[which] > 0.5 and sum(gap > 2e-6 for gap in found.values()) == 1


class Passes(TorchDispatchMode):
    """Counts operations that write as many elements as a matrix has."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.least and not func.is_view:
            self.count[func.name()] += 1
        return out


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_multiplier_costs_no_pass_in_either_direction(scaling: Any) -> None:
    counts = []
    for alpha in (1.0, ALPHA):
        x, weight, bias, grad = (tensor.to("meta") for tensor in drawn((32, 48, 64), torch.bfloat16))
        with Passes(least=48 * 32) as passes:
            computed(Float8Products(scaling), x, weight, bias, grad, alpha)
        counts.append(passes.count)
    assert counts[0] == counts[1] and counts[0]["aten::_scaled_mm"] == 3


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(32, 64, 48), (5, 36, 20)], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_torchs_fp8_gemm_gives_what_the_float32_gemm_gives(
    dtype: torch.dtype, shape: tuple[int, int, int], scaling: Any
) -> None:
    """On a CPU ``multiply`` takes a float32 GEMM; ``scaled_mm``, with its padding, is what a GPU takes."""
    m, k, n = shape
    a, b, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    first = quantize(a, largest_magnitude(a, scaling), dtype)
    second = quantize(b, largest_magnitude(b, scaling), E4M3)
    torch.testing.assert_close(
        scaled_mm(first, second, torch.float32, bias),
        multiply(first, second, torch.float32, bias=bias),
        rtol=1e-6,
        atol=1e-5,
    )


@pytest.mark.parametrize("alpha", [1.0, ALPHA])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_whole_layer_by_torchs_fp8_gemm(scaling: Any, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = drawn((9, 36, 20))
    monkeypatch.setattr(
        quantize_module, "_multiply_on_cpu", lambda a, b, out_dtype, bias: scaled_mm(a, b, out_dtype, bias)
    )
    actual = computed(Float8Products(scaling), *operands, alpha)
    assert max(gaps(actual, expected_of(*operands, alpha, scaling)).values()) < 2e-6


@pytest.mark.parametrize("shape", [*SHAPES, (256, 5120, 640), (0, 48, 64)], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_shape_passes_torchs_checks_for_cuda(scaling: Any, shape: tuple[int, int, int]) -> None:
    """On fake CUDA tensors, whose ``_scaled_mm`` refuses what is no multiple of 16; each backward product directly."""
    tokens, n_in, n_out = shape
    products = Float8Products(scaling)
    with FakeTensorMode(), torch.no_grad():
        x, weight, bias, grad = (
            torch.empty(size, device="cuda", dtype=torch.bfloat16)
            for size in ((2, tokens, n_in), (n_out, n_in), (n_out,), (2 * tokens, n_out))
        )
        out, saved = products.output(x, weight, bias, ALPHA)
        gradients = products.gradients(grad, saved, ALPHA)
        of_input, of_weight = gradients.of_input(weight), gradients.of_weight(x.view(-1, n_in))
    assert out.shape == (2, tokens, n_out) and of_input.shape == (2 * tokens, n_in)
    assert of_weight.shape == weight.shape and out.is_contiguous() and of_weight.is_contiguous()
    assert {value.device.type for value in (out, of_input, of_weight)} == {"cuda"}
    assert {value.dtype for value in (out, of_input, of_weight)} == {torch.bfloat16}


def test_scales_are_powers_of_two_that_fit() -> None:
    amax = torch.cat([torch.logspace(-20, 20, 997), torch.tensor([448.0, 448.01, 896.0, 57344.0, 0.0])])
    for dtype in (E4M3, E5M2):
        scale = scale_of(amax, dtype)
        assert (torch.frexp(scale).mantissa == 0.5).all()
        assert (amax / scale <= torch.finfo(dtype).max * (1 + 1e-6)).all()
        assert (amax[:-1] / scale[:-1] > torch.finfo(dtype).max * 0.4999).all()  # no smaller one fits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_finite_stays_so(scaling: Any, bad: float) -> None:
    x, weight, bias, _ = drawn((8, 16, 16))
    x[1, 3, 5] = bad
    out = Float8Products(scaling).linear(x, weight, bias, 1.0)
    assert out[1, 3].isnan().all()
    if scaling == "row":
        assert out[0].isfinite().all()


def test_zeros_give_zeros() -> None:
    for scaling in ("tensor", "row"):
        actual = computed(
            Float8Products(scaling), *(torch.zeros_like(operand) for operand in drawn((8, 16, 16))), ALPHA
        )
        assert all((value == 0).all() for value in actual.values())


def test_a_rows_rounding_does_not_depend_on_its_batch() -> None:
    """Scales are powers of two: with one scale per tensor too, a row's values are rounded alike beside larger ones."""
    x, weight, bias, _ = drawn((64, 128, 32))
    x = x / x.abs().amax(-1, keepdim=True)
    for scaling in ("tensor", "row"):
        products = Float8Products(scaling)
        alone = products.linear(x[:1, :8], weight, bias, ALPHA)
        louder = torch.cat([x[:1], 40 * x[:1, :3]], dim=1)
        together = products.linear(louder, weight, bias, ALPHA)[:, :8]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 if scaling == "tensor" else 1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frozen_operands_get_no_gradient(scaling: Any) -> None:
    x, weight, bias, _ = drawn((8, 16, 16))
    bias.requires_grad_()
    Float8Products(scaling).linear(x, weight, bias, ALPHA).sum().backward()
    assert x.grad is None and weight.grad is None and torch.equal(bias.grad, torch.full((16,), 16.0))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_empty_batch(scaling: Any) -> None:
    _, weight, bias, _ = drawn((8, 16, 16))
    x, weight = torch.empty(2, 0, 16, requires_grad=True), weight.requires_grad_()
    out = Float8Products(scaling).linear(x, weight, bias, ALPHA)
    out.sum().backward()
    assert out.shape == (2, 0, 16) and x.grad.shape == x.shape and (weight.grad == 0).all()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_recomputation_gives_the_same_bits(scaling: Any, recompute: Any) -> None:
    products, results = Float8Products(scaling), []
    x, weight, bias, grad = drawn((9, 36, 36))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    for how in ("none", recompute):
        [out] = run_block(lambda inputs: (products.linear(inputs[0].sin(), weight, bias, ALPHA).sin(),), (x,), how)
        results.append(torch.autograd.grad(out, leaves, grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_graph_does_not_break(scaling: Any) -> None:
    products = Float8Products(scaling)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return products.linear(x, weight, bias, ALPHA).tanh()

    x, weight, bias, grad = drawn((9, 36, 36))
    results = []
    with compiling():
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_on_a_gpu(scaling: Any, shape: tuple[int, int, int]) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 units")
    operands = drawn(shape, torch.bfloat16)
    actual = computed(Float8Products(scaling), *(tensor.cuda() for tensor in operands), ALPHA)
    expected = expected_of(*operands, ALPHA, scaling)
    assert max(gaps({name: value.cpu() for name, value in actual.items()}, expected).values()) < 0.01
