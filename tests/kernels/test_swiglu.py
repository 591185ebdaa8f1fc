"""SwiGLU's product: the Triton kernels, in its interpreter, against float64 in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.compiler import compiling
from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit_kernels import swiglu


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    need_interpreter()
    swiglu.select("fused")
    yield
    swiglu.select("auto")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(*shape)).to(dtype).requires_grad_()


def check(h: Tensor, tolerance: float, bias: Tensor | None = None) -> None:
    leaves = [h] if bias is None else [h, bias]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = swiglu(*leaves), swiglu.reference(*wide)
    given = torch.randn_like(out)
    grads, exact = torch.autograd.grad(out, leaves, given), torch.autograd.grad(expected, wide, given.double())
    names = ("value", "gradient", "gradient of the bias")
    for name, part, value in zip(names, (out, *grads), (expected, *exact), strict=False):
        error = (part.double() - value).abs().max() / value.abs().max()
        assert part.dtype == h.dtype and error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("width", [36, 144, 576, 768, 3072, pytest.param(10240, marks=pytest.mark.slow)])
def test_values_and_gradients_at_every_width(width: int) -> None:
    check(draw(2, 3, 2 * width), 2e-6)
    check(draw(2, 3, 2 * width), 2e-6, draw(2 * width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-10
    check(draw(2, 5, 576, dtype=dtype), tolerance)
    check(draw(2, 5, 576, dtype=dtype), tolerance, draw(576, dtype=dtype))


def test_chunks_of_rows_add_up_to_the_biass_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels import partial_sums

    monkeypatch.setattr(partial_sums, "_LEAST_ROWS", 8)
    monkeypatch.setattr(partial_sums, "_CHUNKS", 40)
    check(draw(2, 211, 72), 3e-6, draw(72))


def test_large_gates_neither_overflow_nor_give_nan() -> None:
    h = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    out = swiglu(h)
    (grad,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(out, torch.tensor([[-0.0, 0.0, 100.0, 1e4]])) or torch.allclose(out, swiglu.reference(h))
    assert grad.isfinite().all()


def test_strided_and_empty_operands() -> None:
    rows = draw(6, 288).detach()[::2].requires_grad_()
    assert torch.equal(swiglu(rows), swiglu(rows.detach().clone()))
    empty = draw(0, 4, 32)
    assert swiglu(empty).shape == (0, 4, 16) and swiglu(empty.detach().to("meta")).shape == (0, 4, 16)


def test_nothing_is_read_or_written_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    h, bias = (arena.operand(draw(*shape).detach()).requires_grad_() for shape in ((3, 200), (200,)))
    given = arena.operand(torch.randn(3, 100))
    with arena.allocating(monkeypatch):
        out = swiglu(h, bias)
        grads = torch.autograd.grad(out, (h, bias), given)
    arena.check()
    assert all(part.isfinite().all() for part in (out, *grads))


def test_each_element_is_moved_once() -> None:
    h = draw(64, 2 * 576, dtype=torch.bfloat16)
    with counted() as launches:
        out = swiglu(h)
        torch.autograd.grad(out, h, torch.ones_like(out))
    unit = 64 * 576 * 2
    assert [(launch.name, launch.bytes) for launch in launches] == [("forward", 3 * unit), ("backward", 5 * unit)]
    assert all(sum(launch.requested.values()) == launch.bytes for launch in launches)


def test_bytes_of_the_biass_gradient() -> None:
    """Partial sums of 32 rows or more, in float32, are what comes on top."""
    h, bias = draw(256, 2 * 288, dtype=torch.bfloat16), draw(2 * 288, dtype=torch.bfloat16)
    with counted() as launches:
        out = swiglu(h, bias)
        torch.autograd.grad(out, (h, bias), torch.ones_like(out))
    unit, vector = 256 * 288 * 2, 2 * 288 * 2
    forward, backward, add = launches
    assert forward.bytes == 3 * unit + vector and add.name == "add_partials"
    assert (backward.bytes + add.bytes) / (5 * unit + 2 * vector) <= 1.10


def test_compiled_whole_and_by_torchs_contract() -> None:
    from megadit_kernels.swiglu import fused

    h = draw(2, 3, 64)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for bias in (None, draw(64)):
        torch.library.opcheck(fused.run.forward, (h, bias), test_utils=utilities)
    (eager,) = torch.autograd.grad(swiglu(h).square().sum(), h)
    with compiling():
        compiled = torch.compile(lambda h: swiglu(h).square().sum(), fullgraph=True, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(h), h)
    assert torch.equal(grad, eager)


FAULTS = {
    "the gate": ("out = gate / (1.0 + tl.exp(-gate)) * up", "out = up"),
    "gate for up": ("(1.0 + tl.exp(-gate)) * up", "(1.0 + tl.exp(-gate)) * gate"),
    "the slope of silu": ("sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid"),
    "the bias": ("value += tl.load(bias", "value += 0.0 * tl.load(bias"),
    "the gate's bias for up's": (
        "columns + M, inside, here)\n    out",
        "columns + M, inside, here) - _biased(bias + M, None, 0, columns, inside, here) + _biased("
        "bias, None, 0, columns, inside, here)\n    out",
    ),
    "gate's sum for up's": ("tl.sum(up_sum, 0)", "tl.sum(gate_sum, 0)"),
    "a block of rows in the sum": ("gate_sum += dgate", "gate_sum = dgate"),
    "up, backward": ("grad * up * sigmoid", "grad * sigmoid"),
    "the gate, backward": ("dup = grad * gate * sigmoid", "dup = grad * sigmoid"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.swiglu import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="value|gradient"):
        check(draw(2, 20, 128), 2e-6, draw(128))
