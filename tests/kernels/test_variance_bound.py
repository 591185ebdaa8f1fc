"""The variational bound of a learned variance: the Triton kernels, in its interpreter, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compiler import compiling
from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit.diffusion.objectives.ddpm import NoiseSchedule
from megadit_kernels import variance_bound
from megadit_kernels.variance_bound import reference

STEPS = (0, 1, 20, 500, 999)
PREDICTS = ("noise", "v")


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    need_interpreter()
    variance_bound.select("fused")
    yield
    variance_bound.select("auto")


def operands(predicts: str, shape: tuple[int, ...] = (4, 6, 6), steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
    """A sample per step, some elements in the open bins, with an output near the truth: away from the clamp at 1e-12.

    The two halves of the output lie in one tensor, as a model gives them.
    """
    torch.manual_seed(0)
    schedule, index = NoiseSchedule(1000), torch.tensor(steps)
    x0 = torch.randn(len(steps), *shape).mul(0.6).clamp(-1, 1)
    noise = torch.randn_like(x0)
    row = schedule.at("bound", index)
    signal, sigma = (row[:, column].view(-1, *[1] * len(shape)) for column in (4, 5))
    truth = noise if predicts == "noise" else signal * noise - sigma * x0
    output = torch.cat([truth + 0.3 * torch.randn_like(x0), 0.5 * torch.randn_like(x0)], dim=1)
    return {"output": output, "x0": x0, "x": signal * x0 + sigma * noise, "row": row}


def bits(given: dict[str, Any], output: Tensor, predicts: str, op: Any = variance_bound) -> Tensor:
    prediction, variance = output.chunk(2, dim=1)
    result: Tensor = op(variance, prediction, given["x0"], given["x"], given["row"], predicts)
    return result


def exact(given: dict[str, Any], output: Tensor, predicts: str) -> Tensor:
    """In float64, by the reference's own formulas."""
    prediction, variance = output.chunk(2, dim=1)
    each = (-1, *[1] * (output.dim() - 1))
    low, high, from_x0, from_x, signal, sigma, first = (part.reshape(each) for part in given["row"].double().unbind(1))
    x0, x = given["x0"].double(), given["x"].double()
    log_variance = (variance + 1) / 2 * high + (1 - variance) / 2 * low
    said = prediction.detach()
    mean = from_x0 * ((x - sigma * said) / signal if predicts == "noise" else signal * x - sigma * said) + from_x * x
    kl = reference.gaussian_kl(from_x0 * x0 + from_x * x, low, mean, log_variance)
    nll = -reference.discretized_log_likelihood(x0, mean, log_variance / 2)
    return torch.where(first > 0, nll, kl).flatten(1).mean(1) / math.log(2)


def check(predicts: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    # Of the last step's slope by v float32 leaves nothing: the posterior's variance is beta to five digits.
    given = operands(predicts, **{"steps": STEPS[:4] if predicts == "v" else STEPS, **settings})
    output = given["output"].to(dtype).requires_grad_()
    wide = output.detach().double().requires_grad_()
    result, expected = bits(given, output, predicts), exact(given, wide, predicts)
    weights = 2.0**16 * (torch.rand(len(result)) + 0.5)  # as fp16's loss scale
    (grad,) = torch.autograd.grad(result, output, weights)
    (slope,) = torch.autograd.grad(expected, wide, weights.double())
    assert result.dtype == torch.float32 and grad.dtype == dtype
    half = output.shape[1] // 2
    assert not grad[:, :half].any(), "gradient of the prediction"
    # Step 0 divides a difference by a standard deviation of 0.01: float32 is worth three digits less there. Of the last
    # step's bits float32 leaves 1e-8, as the two means are alike.
    assert torch.allclose(result.double(), expected, rtol=2e-3, atol=1e-7), f"value: {result} {expected}"
    for ours, theirs in zip(grad[:, half:].double(), slope[:, half:], strict=True):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < (2e-3 if dtype == torch.float32 else 1e-2), f"gradient: {error:.2e}"


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 32, 32), (3, 5, 5)])
def test_values_and_gradients(predicts: str, shape: tuple[int, ...]) -> None:
    check(predicts, shape=shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype: torch.dtype) -> None:
    check("v", dtype, steps=(1, 20, 500))


@pytest.mark.parametrize("predicts", PREDICTS)
def test_it_is_torchs_result_at_every_step_and_in_the_open_bins(predicts: str) -> None:
    given = operands(predicts, (4, 8, 8))
    given["x0"][:, 0, 0] = 1.0
    given["x0"][:, 0, 1] = -1.0
    pairs = []
    for op in (variance_bound, variance_bound.reference):
        output = given["output"].clone().requires_grad_()
        value = bits(given, output, predicts, op)
        pairs.append((value.detach(), *torch.autograd.grad(value.sum(), output)))
    (ours, grad), (theirs, slope) = pairs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, slope, rtol=2e-3, atol=1e-5 * float(slope.abs().max()))


def test_an_improbable_image_is_clamped_and_has_no_slope_there() -> None:
    given = operands("noise", steps=(0,))
    given["x0"].mul_(0.9)  # none in an open bin
    output = torch.cat([given["output"][:, :4] + 60.0, torch.full_like(given["x0"], -1.0)], dim=1).requires_grad_()
    value = bits(given, output, "noise")
    assert value.item() == pytest.approx(-math.log2(1e-12), rel=1e-4)
    (grad,) = torch.autograd.grad(value, output)
    assert not grad.any()


def test_nothing_is_read_or_written_outside_and_the_output_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, given = Arena(), operands("noise", (3, 5, 5))
    output = arena.operand(given["output"]).requires_grad_()
    given = {name: arena.operand(value) for name, value in given.items()}
    with arena.allocating(monkeypatch), counted() as launches:
        value = bits(given, output, "noise")
        (grad,) = torch.autograd.grad(value, output, torch.ones(5))
    arena.check()
    assert value.isfinite().all() and grad.isfinite().all()
    count = 5 * 75 * 4
    assert {launch.name: launch.bytes for launch in launches} == {
        "bound": 4 * count + 5 * (7 * 4 + 4),
        "bound_backward": 5 * count + 5 * (7 * 4 + 4),
    }


def test_a_sample_does_not_depend_on_the_batch_around_it_and_an_empty_batch_passes() -> None:
    given = operands("v")
    whole = bits(given, given["output"], "v")
    alone = {name: value[2:3] for name, value in given.items()}
    assert torch.equal(whole[2:3], bits(alone, alone["output"], "v"))
    none = {name: value[:0] for name, value in given.items()}
    assert bits(none, none["output"], "v").shape == (0,)


def test_a_large_sample_is_summed_in_chunks_whatever_the_batch() -> None:
    given = operands("noise", (4, 72, 72), (0, 20, 500))
    with counted() as launches:
        whole = bits(given, given["output"], "noise")
    assert [(launch.name, launch.programs) for launch in launches] == [("bound", 6), ("add_partials", 1)]
    assert torch.allclose(whole.double(), exact(given, given["output"].double(), "noise"), rtol=2e-3)
    alone = {name: value[1:2] for name, value in given.items()}
    assert torch.equal(whole[1:2], bits(alone, alone["output"], "noise"))


def test_compiled_whole_and_by_torchs_contract() -> None:
    from megadit_kernels.variance_bound import fused

    given = operands("noise")
    prediction, variance = given["output"].chunk(2, dim=1)
    variance = variance.detach().requires_grad_()
    arguments = (variance, prediction, given["x0"], given["x"], given["row"], "noise")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused.run.forward, arguments, test_utils=utilities)
    (eager,) = torch.autograd.grad(variance_bound(*arguments).sum(), variance)
    with compiling():
        compiled = torch.compile(lambda v: variance_bound(v, *arguments[1:]).sum(), fullgraph=True, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(variance), variance)
    assert torch.equal(grad, eager)


FAULTS = {
    "the upper log variance": ("share * high + (1.0 - share) * low", "share + (1.0 - share) * low"),
    "the bounds of the variance": ("share * high + (1.0 - share) * low", "share * low + (1.0 - share) * high"),
    "signal": ("(x - sigma * given) / signal", "x - sigma * given"),
    "sigma": ("(x - sigma * given) / signal", "(x - given) / signal"),
    "signal of v": ("signal * x - sigma * given", "x - sigma * given"),
    "sigma of v": ("signal * x - sigma * given", "signal * x - given"),
    "the weight of x0": ("from_x0 * denoised + from_x * x", "denoised + from_x * x"),
    "the weight of x": ("from_x0 * denoised + from_x * x", "from_x0 * denoised + x"),
    "the true mean": ("mean\n            nats = 0.5", "mean * 0.5\n            nats = 0.5"),
    "the variances' ratio": ("ratio - 1.0 + tl.exp(-ratio)", "ratio - 1.0 + tl.exp(ratio)"),
    "the mean over a sample": ("tl.sum(total, 0) / COUNT", "tl.sum(total, 0)"),
    "a chunk's first element": ("chunk * CHUNK + start", "start"),
    "a chunk's part": ("chunk * tl.num_programs(0) + sample", "sample"),
    "bits": ("/ COUNT * 1.4426950408889634)\n\n", "/ COUNT)\n\n"),
    "the first step": ("if first > 0.0:\n            inverse", "if first > 2.0:\n            inverse"),
    "the bin's edges": ("upper - lower))", "lower - upper))"),
    "the first step, backward": ("if first > 0.0:\n        inverse", "if first > 2.0:\n        inverse"),
    "the slope of the CDF": ("(1.0 + 0.134145 * y * y)", "1.0"),
    "the lower edge, backward": ("- tl.where(clean < -0.999, 0.0, density(below) * below)", ""),
    "the ratio, backward": ("1.0 - tl.exp(low - log_variance)", "1.0"),
    "the distance, backward": ("- distance * distance * tl.exp(-log_variance))\n    slope", ")\n    slope"),
    "the share of the variance, backward": ("slope * (high - low) * 0.5", "slope * 0.5"),
    "the gradient that is given": ("tl.load(grad + sample) / COUNT", "1.0 / COUNT"),
    "bits, backward": ("/ COUNT * 1.4426950408889634)\n    tl", "/ COUNT)\n    tl"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.variance_bound import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="value|gradient"):
        for predicts in PREDICTS:
            check(predicts)
        if "chunk" in fault:
            check("noise", shape=(4, 72, 72), steps=(20, 500))
