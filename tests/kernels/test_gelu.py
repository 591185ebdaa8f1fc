"""Bias and GELU: the Triton kernels, in its interpreter, against float64 in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.compiler import compiling
from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit_kernels import bias_gelu
from megadit_kernels.gelu import Approximation

FORMS: tuple[Approximation, ...] = ("tanh", "none")


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    need_interpreter()
    bias_gelu.select("fused")
    yield
    bias_gelu.select("auto")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(*shape)).to(dtype).requires_grad_()


def check(h: Tensor, bias: Tensor | None, tolerance: float, approximate: Approximation = "tanh") -> None:
    leaves = [h] if bias is None else [h, bias]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = bias_gelu(*leaves, approximate=approximate), bias_gelu.reference(*wide, approximate=approximate)
    given = torch.randn_like(out)
    grads, exact = torch.autograd.grad(out, leaves, given), torch.autograd.grad(expected, wide, given.double())
    names = ("value", "gradient", "gradient of the bias")
    for name, part, value in zip(names, (out, *grads), (expected, *exact), strict=False):
        error = (part.double() - value).abs().max() / value.abs().max()
        assert part.dtype == h.dtype and error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("width", [36, 144, 576, 1152, 4608, pytest.param(20480, marks=pytest.mark.slow)])
def test_values_and_gradients_at_every_width(width: int, approximate: Approximation) -> None:
    check(draw(2, 3, width), draw(width), 2e-6, approximate)
    check(draw(1, 2, width), None, 2e-6, approximate)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, approximate: Approximation) -> None:
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-10
    check(draw(2, 5, 576, dtype=dtype), draw(576, dtype=dtype), tolerance, approximate)


@pytest.mark.parametrize("approximate", FORMS)
def test_large_values_neither_overflow_nor_give_nan(approximate: Approximation) -> None:
    h = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], requires_grad=True)
    out = bias_gelu(h, None, approximate=approximate)
    (grad,) = torch.autograd.grad(out.sum(), h)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))


def test_chunks_of_rows_add_up_to_the_biass_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels import partial_sums

    monkeypatch.setattr(partial_sums, "_LEAST_ROWS", 8)
    monkeypatch.setattr(partial_sums, "_CHUNKS", 20)
    check(draw(2, 211, 72), draw(72), 3e-6)


def test_a_bias_of_another_dtype_has_its_gradient_in_it() -> None:
    h, bias = draw(2, 5, 36, dtype=torch.bfloat16), draw(36)
    out = bias_gelu(h, bias)
    grads = torch.autograd.grad(out.float().sum(), (h, bias))
    assert out.dtype == torch.bfloat16 and [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_strided_and_empty_operands() -> None:
    bias = draw(288)
    rows = draw(6, 288).detach()[::2].requires_grad_()
    assert torch.equal(bias_gelu(rows, bias), bias_gelu(rows.detach().clone(), bias))
    empty = draw(0, 4, 288)
    grads = torch.autograd.grad(bias_gelu(empty, bias).sum(), (empty, bias))
    assert grads[0].shape == empty.shape and not grads[1].any() and grads[1].shape == (288,)


def test_a_row_does_not_depend_on_the_batch_around_it_and_the_backward_pass_repeats_its_bits() -> None:
    h, bias = draw(3, 70, 72), draw(72)
    out = bias_gelu(h, bias)
    assert torch.equal(bias_gelu(h[1:2, 7:8], bias), out[1:2, 7:8])
    runs = [torch.autograd.grad(bias_gelu(h, bias).square().sum(), (h, bias)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("approximate", FORMS)
def test_nothing_is_read_or_written_outside(approximate: Approximation, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    h, bias = (arena.operand(draw(*shape).detach()).requires_grad_() for shape in ((3, 300), (300,)))
    given = arena.operand(torch.randn(3, 300))
    with arena.allocating(monkeypatch):
        out = bias_gelu(h, bias, approximate=approximate)
        grads = torch.autograd.grad(out, (h, bias), given)
    arena.check()
    assert all(part.isfinite().all() for part in (out, *grads))


def test_bytes_moved_are_close_to_the_floor() -> None:
    """Each element once; partial sums of 32 rows or more, in float32, are what comes on top."""
    h, bias = draw(256, 288, dtype=torch.bfloat16), draw(288, dtype=torch.bfloat16)
    with counted() as launches:
        out = bias_gelu(h, bias)
        torch.autograd.grad(out, (h, bias), torch.ones_like(out))
    unit, vector = 256 * 288 * 2, 288 * 2
    forward, backward, add = launches
    assert (forward.name, forward.bytes, add.name) == ("forward", 2 * unit + vector, "add_partials")
    assert (backward.bytes + add.bytes) / (3 * unit + 2 * vector) <= 1.10


def test_compiled_whole_and_by_torchs_contract() -> None:
    from megadit_kernels.gelu import fused

    h, bias = draw(2, 3, 64), draw(64)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for given in (bias, None):
        torch.library.opcheck(fused.run.forward, (h, given, "none"), test_utils=utilities)
    eager = torch.autograd.grad(bias_gelu(h, bias).square().sum(), (h, bias))
    with compiling():
        compiled = torch.compile(lambda h, b: bias_gelu(h, b).square().sum(), fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(compiled(h, bias), (h, bias))
    assert all(torch.equal(a, b) for a, b in zip(grads, eager, strict=True))


FAULTS: dict[str, tuple[Approximation, str, str]] = {
    "the bias": ("tanh", "value += tl.load(bias", "value += 0.0 * tl.load(bias"),
    "the share": ("tanh", "(value * share)", "(value)"),
    "the cube": ("tanh", "0.044715 * x * x * x", "0.044715 * x"),
    "the slope of the share, tanh": ("tanh", "+ x * share * (1.0 - share) *", "+ 0.0 *"),
    "the slope of the cube": ("tanh", "(1.0 + 0.134145 * x * x)", "(1.0)"),
    "half of erf": ("none", "0.5 + 0.5 * tl.erf", "0.5 + tl.erf"),
    "the root of two": ("none", "tl.erf(0.7071067811865476 * x)", "tl.erf(x)"),
    "the slope of the share, erf": ("none", "+ x * 0.39894", "+ 0.39894"),
    "the density": ("none", "tl.exp(-0.5 * x * x)", "tl.exp(-x * x)"),
    "the given gradient": ("tanh", ".to(tl.float32) * slope", ".to(tl.float32)"),
    "a block of rows in the sum": ("tanh", "total += grad", "total = grad"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.gelu import fused

    approximate, right, wrong = FAULTS[fault]
    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, right, wrong, tmp_path))
    with pytest.raises(AssertionError, match="value|gradient"):
        check(draw(2, 20, 128), draw(128), 2e-6, approximate)
