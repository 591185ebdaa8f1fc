"""scaled_linear against its plain reference: values, gradients, and the cases where it must be F.linear itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megadit_kernels import scaled_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [x, w] if b is None else [x, w, b]
    ours, expected = scaled_linear(x, w, b, 0.25), scaled_linear.reference(x, w, b, 0.25)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    grad = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *args: scaled_linear(args[0], args[1], b, -1.5), (x, w))


def test_alpha_one_is_linear_bit_for_bit() -> None:
    x, w, b = torch.randn(7, 6), torch.randn(4, 6), torch.randn(4)
    assert torch.equal(scaled_linear(x, w, b), F.linear(x, w, b))


def test_frozen_operands_get_no_gradient() -> None:
    x, w, b = torch.randn(7, 6), torch.randn(4, 6), torch.randn(4, requires_grad=True)
    scaled_linear(x, w, b, 0.5).sum().backward()
    assert x.grad is None and w.grad is None and torch.equal(b.grad, torch.full((4,), 7.0))


def test_under_autocast_runs_and_differentiates() -> None:
    x, w, b = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_linear(x, w, b, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(w.grad, 0.5 * x.sum(0).expand(4, 16), rtol=0.05, atol=0.05)
