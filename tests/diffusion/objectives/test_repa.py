"""The REPA loss against a float64 writing, its gradient, and vectors that have no direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megadit import rng
from megadit.diffusion import LossTerms
from megadit.diffusion.objectives.repa import alignment_loss, with_alignment


def tokens(name: str, batch: int = 3, scale: float = 1.0) -> Tensor:
    return scale * rng.normal(rng.stream_key(2, name), (batch, 5, 7))


def written_out(projected: Tensor, target: Tensor) -> Tensor:
    """-cos, token by token, in float64."""
    samples = []
    for one, other in zip(projected.double(), target.double(), strict=True):
        cosines = [(p @ t) / (p.norm() * t.norm()) for p, t in zip(one, other, strict=True)]
        samples.append(-sum(cosines) / len(cosines))
    return torch.stack(samples)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_it_is_the_mean_negative_cosine(scale: float) -> None:
    projected, target = tokens("p", scale=scale).requires_grad_(), tokens("t")
    loss = alignment_loss(projected, target)
    exact = projected.detach().double().requires_grad_()
    expected = written_out(exact, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    loss.sum().backward()
    expected.sum().backward()
    assert projected.grad is not None and exact.grad is not None
    torch.testing.assert_close(projected.grad.double(), exact.grad, rtol=1e-4, atol=1e-7 / scale)


def test_equal_directions_give_minus_one_and_opposite_ones_one() -> None:
    target = tokens("t")
    torch.testing.assert_close(alignment_loss(3 * target, target), -torch.ones(3))
    torch.testing.assert_close(alignment_loss(-target, 0.1 * target), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_to_float32(dtype: torch.dtype) -> None:
    """The squares of these entries overflow float16."""
    projected, target = tokens("p", scale=1e3).to(dtype).requires_grad_(), tokens("t", scale=1e3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(projected, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), written_out(projected.detach(), target), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert projected.grad is not None and projected.grad.isfinite().all()


def test_vectors_without_a_direction_count_zero_and_are_not_pulled() -> None:
    projected, target = tokens("p"), tokens("t")
    projected[0, 1], target[1, 2] = 0.0, 0.0
    projected.requires_grad_()
    loss = alignment_loss(projected, target)
    expected = written_out(projected.detach()[0, [0, 2, 3, 4]][None], target[0, [0, 2, 3, 4]][None])
    torch.testing.assert_close(loss[0].double(), 0.8 * expected[0], rtol=1e-6, atol=1e-7)
    loss.sum().backward()
    assert projected.grad is not None and projected.grad.isfinite().all()
    assert not projected.grad[0, 1].any() and not projected.grad[1, 2].any() and projected.grad[0, 0].any()


def test_it_joins_the_other_terms_with_its_weight() -> None:
    mse = torch.tensor([1.0, 2.0, 3.0])
    terms = with_alignment(LossTerms(mse, {"mse": mse}), tokens("p"), tokens("t"), 0.5)
    repa = alignment_loss(tokens("p"), tokens("t"))
    assert torch.equal(terms.total, mse + 0.5 * repa)
    assert list(terms.terms) == ["mse", "repa"] and torch.equal(terms.terms["repa"], repa)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        alignment_loss(tokens("p"), tokens("t")[:, :4])
