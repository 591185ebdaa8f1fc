"""Every objective by the fused kernels of noise and error, in Triton's interpreter: samples, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.kernels.interpreter import counted, need_interpreter
from megadit.conditioning import Conditioning
from megadit.config.schema.kernels import KernelConfig
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion import build_objective
from megadit.engine.kernels import select_kernels
from megadit.rng import normal

SHAPE = (4, 8, 8)
OBJECTIVES: dict[str, tuple[dict[str, Any], bool]] = {
    "noise": ({}, False),
    "noise and variance": ({}, True),
    "v": ({"prediction": "v"}, False),
    "v and variance, min-SNR": ({"prediction": "v", "weighting": "min_snr"}, True),
    "noise, min-SNR": ({"weighting": "min_snr"}, False),
    "flow": ({"kind": "flow"}, False),
    "flow, logit-normal": ({"kind": "flow", "time_sampling": "logit_normal", "shift": 3.0}, False),
}


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    need_interpreter()
    yield
    select_kernels(KernelConfig())


def step(settings: dict[str, Any], learn_sigma: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch's noise, the losses of an output that does not depend on it, and the output's gradient."""
    objective = build_objective(ObjectiveConfig(**settings), learn_sigma=learn_sigma, null=None)
    x0 = torch.stack([normal(n, SHAPE) for n in range(6)])
    noisy = objective.prepare(x0, Conditioning(), range(6), 3)
    output = normal(9, (6, 8 if learn_sigma else 4, 8, 8)).to(dtype).requires_grad_()
    terms = objective.loss(output, noisy)
    terms.total.mean().backward()
    assert output.grad is not None and output.grad.dtype == dtype
    return {"x": noisy.x, "target": noisy.target, "t": noisy.t, "grad": output.grad.float(), **terms.terms}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_is_the_same_by_fused_kernels(name: str, dtype: torch.dtype) -> None:
    settings, learn_sigma = OBJECTIVES[name]
    expected = step(settings, learn_sigma, dtype)
    select_kernels(KernelConfig(noise="fused"))
    with counted() as launches:
        fused = step(settings, learn_sigma, dtype)
    names = ["mix", "error", "bound", "bound_backward", "error_backward"]
    assert {launch.name for launch in launches} == {name for name in names if learn_sigma or "bound" not in name}
    assert len(launches) == (5 if learn_sigma else 3)
    assert fused.keys() == expected.keys()
    for part, value in fused.items():
        rounding = 2**-7 if part == "grad" and dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(value, expected[part], rtol=rounding, atol=1e-5), part


def test_fixed_noise_of_the_validation_loss_is_taken_as_it_is() -> None:
    objective = build_objective(ObjectiveConfig(kind="flow"), learn_sigma=False, null=None)
    x0, noise = normal(1, (2, *SHAPE)), normal(2, (2, *SHAPE))
    select_kernels(KernelConfig(noise="fused"))
    noisy = objective.prepare(x0, Conditioning(), range(2), 0, t01=torch.tensor([0.25, 0.5]), noise=noise)
    assert torch.equal(noisy.target, noise - x0)
    torch.testing.assert_close(noisy.x[1], 0.5 * x0[1] + 0.5 * noise[1])
