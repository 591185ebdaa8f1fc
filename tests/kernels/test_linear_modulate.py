"""Adaptive LayerNorm and gated residual against their plain references."""

from __future__ import annotations

import torch

from megadit_kernels import gated_residual, norm_modulate


def test_norm_modulate_values_and_gradients() -> None:
    torch.manual_seed(0)
    x, shift, scale = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 5, 8), (2, 8), (2, 8)])
    assert torch.autograd.gradcheck(lambda *a: norm_modulate(*a, eps=1e-6), (x, shift, scale))
    torch.testing.assert_close(
        norm_modulate(x, shift, scale), norm_modulate.reference(x, shift, scale), rtol=1e-12, atol=1e-12
    )


def test_gated_residual_values_and_gradients() -> None:
    torch.manual_seed(0)
    x, gate, branch = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 5, 8), (2, 8), (2, 5, 8)])
    assert torch.autograd.gradcheck(gated_residual, (x, gate, branch))
    torch.testing.assert_close(
        gated_residual(x, gate, branch), gated_residual.reference(x, gate, branch), rtol=1e-12, atol=1e-12
    )
