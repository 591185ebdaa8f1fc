"""Keyed noise, its mixture and the squared error: the Triton kernels, in its interpreter, against plain torch.

The integers are equal to the bit, floats to the bounds that stand here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compiler import compiling
from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit.rng import sample_keys
from megadit_kernels import OPS_OF_KEY, keyed_normal, mix_noise, squared_error
from megadit_kernels.noise import reference

KEYS = (0, -1, 1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -7046029254386353131)
TARGETS = ("noise", "velocity", "v")
# Of a normal, which is 6.8 at most: two units in the last place of log, root and sine, and of their product.
NORMAL_BOUND = 1.5e-6


# Without a GPU in Triton's interpreter.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _fused(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.node.get_closest_marker("gpu"):
        need_interpreter()
    for op in OPS_OF_KEY["noise"]:
        op.select("fused")
    yield
    for op in OPS_OF_KEY["noise"]:
        op.select("auto")


def draw(*shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape)


def levels(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, signal and sigma, the last two not adding up to 1, so that none can stand for the other."""
    torch.manual_seed(1)
    return sample_keys(5, "noise", range(batch)), 0.3 + torch.rand(batch), 0.4 + torch.rand(batch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", KEYS)
def test_the_integers_are_those_of_the_reference_to_the_bit(key: int, device: str) -> None:
    from helpers.kernels.noise_probe import words_of

    counters = torch.cat([torch.arange(12), torch.tensor([2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])])
    assert torch.equal(words_of(key, counters.to(device)).cpu(), reference.philox(torch.tensor([[key]]), counters)[0])


def test_the_integers_are_those_of_the_authors() -> None:
    """Random123's known answer: counter and key 0."""
    from helpers.kernels.noise_probe import words_of

    assert [hex(word) for word in words_of(0, torch.zeros(1, dtype=torch.int64))[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_uniforms_are_equal_to_the_bit_and_normals_finite_at_every_edge(device: str) -> None:
    """Around each power of two, where float32 begins to round, at both ends, and at the quarters of the circle."""
    from helpers.kernels.noise_probe import numbers_of

    edges = [word + step for bits in range(2, 33) for word in [2**bits] for step in (-3, -2, -1, 0, 1, 2, 3)]
    edges += [quarter * 2**30 + step for quarter in (1, 2, 3) for step in (-129, 64, 128)]
    words = torch.tensor([word for word in edges if 0 <= word < 2**32])
    words = torch.cat([words, torch.randint(0, 2**32, (1024 - len(words),))])
    pairs = torch.stack([words, words[torch.randperm(1024)]], dim=1)
    uniforms, normals = (part.cpu() for part in numbers_of(pairs.to(device)))
    assert torch.equal(uniforms, reference.unit(pairs)) and float(uniforms.max()) == 1.0
    expected = reference.gauss(torch.cat([pairs, pairs], dim=1))[:, :2]
    assert (normals - expected).abs().max() < NORMAL_BOUND and normals.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (3,), (75,), (3, 5, 5), (4, 32, 32)])
def test_normals_are_those_of_the_reference(shape: tuple[int, ...], device: str) -> None:
    keys = sample_keys(3, "noise", range(8))
    noise, expected = keyed_normal(keys.to(device), shape).cpu(), keyed_normal.reference(keys, shape)
    assert noise.dtype == torch.float32 and noise.shape == expected.shape
    assert (noise - expected).abs().max() < NORMAL_BOUND


def check_mix(target: str, x0: Tensor) -> None:
    keys, signal, sigma = levels(len(x0))
    wide = x0.detach().float().requires_grad_()
    own = x0.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    results, expected = (
        mix_noise(own, keys, signal, sigma, target),
        mix_noise.reference(wide, keys, signal, sigma, target),
    )
    given = [draw(*x0.shape, seed=seed) for seed in (2, 3)]
    for name, ours, theirs in zip(("x", "target"), results, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == x0.shape
        assert (ours - theirs).abs().max() < 2 * NORMAL_BOUND, f"value of {name}"
    (grad,) = torch.autograd.grad(results, own, given, allow_unused=True)
    # Where the target is the noise, reference autograd knows that it does not hang on x0.
    tied = [(out, part) for out, part in zip(expected, given, strict=True) if out.requires_grad]
    (exact,) = torch.autograd.grad([out for out, _ in tied], wide, [part for _, part in tied])
    assert torch.allclose(grad.float(), exact, atol=1e-2 if x0.dtype != torch.float32 else 1e-6), "gradient of x0"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (2, 3, 5, 5), (1, 1, 1, 1)])
def test_mixtures_and_targets_are_those_of_the_reference(target: str, shape: tuple[int, ...]) -> None:
    check_mix(target, draw(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_mixed_in_float32(dtype: torch.dtype) -> None:
    check_mix("v", draw(2, 4, 8, 8).to(dtype))


def test_other_strides_and_empty_batches() -> None:
    check_mix("velocity", draw(2, 4, 6, 6).to(memory_format=torch.channels_last))
    keys, signal, sigma = levels(2)
    both = torch.stack([keys, keys], dim=1)
    apart = mix_noise(draw(2, 4, 6, 6), both[:, 0], torch.stack([signal, sigma], 1)[:, 0], sigma, "v")
    assert torch.equal(apart[0], mix_noise(draw(2, 4, 6, 6), keys, signal, sigma, "v")[0])
    empty = draw(0, 4, 6, 6)
    assert [part.shape for part in mix_noise(empty, keys[:0], signal[:0], sigma[:0], "v")] == [(0, 4, 6, 6)] * 2
    assert keyed_normal(keys[:0], (2, 2)).shape == (0, 2, 2) and squared_error(empty, empty).shape == (0,)


def check_error(output: Tensor, weight: Tensor | None, tolerance: float = 1e-6) -> None:
    target = draw(*output.shape, seed=4)
    own, wide = output.detach().requires_grad_(), output.detach().double().requires_grad_()
    errors = squared_error(own, target, weight)
    each = (target.double() - wide).square().flatten(1).mean(1)
    expected = each if weight is None else each * weight.double()
    given = draw(len(output), seed=5)
    (grad,) = torch.autograd.grad(errors, own, given)
    (exact,) = torch.autograd.grad(expected, wide, given.double())
    assert errors.dtype == torch.float32 and grad.dtype == output.dtype and grad.shape == output.shape
    assert torch.allclose(errors.double(), expected, rtol=1e-6), "value"
    error = (grad.double() - exact).abs().max() / exact.abs().max()
    assert error < tolerance, f"gradient: {error:.2e}"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (5, 3, 5, 5), (2, 16, 33, 31), (1, 1, 1, 1)])
def test_errors_and_their_gradients(shape: tuple[int, ...], weighted: bool) -> None:
    check_error(draw(*shape), 0.5 + torch.rand(shape[0]) if weighted else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    output = draw(3, 8, 16, 16).to(dtype)
    check_error(output, torch.rand(3), 2**-8 if dtype == torch.bfloat16 else 2**-10)
    check_error(output[:, :4], None, 2**-8 if dtype == torch.bfloat16 else 2**-10)  # the variance beside it


def test_an_output_beside_its_variance_is_read_in_place_and_its_gradient_put_there() -> None:
    output, target = draw(3, 8, 9, 9).requires_grad_(), draw(3, 4, 9, 9, seed=4)
    prediction, _ = output.split(4, dim=1)
    with counted() as launches:
        squared_error(prediction, target).mean().backward()  # the gradient of a mean has stride 0
    assert [launch.name for launch in launches] == ["error", "error_backward"]
    assert output.grad is not None and output.grad[:, 4:].abs().max() == 0
    expected = 2 * (output.detach()[:, :4] - target) / (3 * target[0].numel())
    torch.testing.assert_close(output.grad[:, :4], expected)


def test_a_large_sample_is_summed_in_chunks_whatever_the_batch() -> None:
    output, target, weight = draw(3, 17000).requires_grad_(), draw(3, 17000, seed=4), torch.rand(3)
    with counted() as launches:
        errors = squared_error(output, target, weight)
    assert [(launch.name, launch.programs) for launch in launches] == [("error", 6), ("add_partials", 1)]
    assert sum(launch.bytes for launch in launches) < 1.001 * (2 * 3 * 17000 * 4)
    assert torch.equal(errors[1:2], squared_error(output[1:2], target[1:2], weight[1:2]))


def test_a_sample_does_not_depend_on_the_batch_around_it() -> None:
    x0, (keys, signal, sigma) = draw(5, 4, 9, 9), levels(5)
    whole, alone = (mix_noise(x0[part], keys[part], signal[part], sigma[part], "v") for part in (slice(5), slice(3, 4)))
    assert torch.equal(whole[0][3:4], alone[0]) and torch.equal(whole[1][3:4], alone[1])
    assert torch.equal(squared_error(*whole)[3:4], squared_error(*alone))


def test_nothing_is_read_or_written_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    keys, signal, sigma = levels(3)
    x0, signal, sigma = (arena.operand(part) for part in (draw(3, 3, 5, 5), signal, sigma))
    output, weight = arena.operand(draw(3, 3, 5, 5, seed=2)).requires_grad_(), arena.operand(torch.rand(3))
    given = arena.operand(draw(3))
    with arena.allocating(monkeypatch):
        x, target = mix_noise(x0, keys, signal, sigma, "v")
        noise = keyed_normal(keys, (3, 5, 5))
        errors = squared_error(output, target, weight)
        (grad,) = torch.autograd.grad(errors, output, given)
    arena.check()
    assert all(part.isfinite().all() for part in (x, target, noise, errors, grad))


def test_each_element_is_moved_once() -> None:
    """Bytes: no noise is written but as the target, and nothing is read twice."""
    batch, count = 4, 4 * 32 * 32
    x0, (keys, signal, sigma) = draw(batch, 4, 32, 32), levels(batch)
    output = draw(batch, 4, 32, 32).bfloat16().requires_grad_()
    with counted() as launches:
        _, target = mix_noise(x0, keys, signal, sigma, "v")
        squared_error(output, target, signal).sum().backward()
    each = {launch.name: launch.bytes for launch in launches}
    assert each == {
        "mix": batch * (count * 12 + 8 + 4 + 4),
        "error": batch * (count * (2 + 4) + 4 + 4),
        "error_backward": batch * (count * (2 + 4 + 2) + 4 + 4),
    }


def test_compiled_whole_and_by_torchs_contract() -> None:
    from megadit_kernels.noise import fused

    keys, signal, sigma = levels(2)
    x0, utilities = draw(2, 3, 4, 4).requires_grad_(), ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused.mix.forward, (x0, keys, signal, sigma, "v"), test_utils=utilities)
    torch.library.opcheck(fused.error.forward, (x0, draw(2, 3, 4, 4), signal), test_utils=utilities)
    torch.library.opcheck(fused.normal_operator, (keys, [3, 4]), test_utils=utilities)

    def step(x0: Tensor) -> Tensor:
        x, target = mix_noise(x0, keys, signal, sigma, "v")
        return squared_error(x * x, target.detach() + keyed_normal(keys, (3, 4, 4)), signal).sum()

    (eager,) = torch.autograd.grad(step(x0), x0)
    with compiling():
        (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x0), x0)
    assert torch.equal(grad, eager)


def test_on_a_gpu_that_is_not_here_shapes_and_types_are_right() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megadit_kernels.noise import fused

    with FakeTensorMode(), torch.no_grad():
        x0, keys = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(2, dtype=torch.int64, device="cuda")
        share, output = torch.empty(2, device="cuda"), torch.empty(2, 8, 8, 8, device="cuda", dtype=torch.bfloat16)
        x, target = mix_noise(x0, keys, share, share, "velocity")
        errors = squared_error(output.narrow(1, 0, 4), target, share)
        grad = fused.launch_error_backward(output.narrow(1, 0, 4), target, share, errors)
        noise = keyed_normal(keys, (4, 8, 8))
        for part in (x, target, noise):
            assert (part.device.type, part.dtype, part.shape) == ("cuda", torch.float32, (2, 4, 8, 8))
        assert (errors.shape, errors.dtype, grad.shape, grad.dtype) == ((2,), torch.float32, x0.shape, torch.bfloat16)
        assert fused.mix_backward(x, target, share, share, "v").shape == x0.shape


FAULTS: dict[str, Any] = {
    "a round of Philox": ("static_range(10)", "static_range(9)"),
    "the key's upper half": ("(key >> 32).to", "(key >> 31).to"),
    "one multiplier for the other": ("tl.umulhi(c2, 0xCD9E8D57), c2", "tl.umulhi(c2, 0xD2511F53), c2"),
    "the factor of the logarithm": ("-2.0 * tl.log", "-1.0 * tl.log"),
    "sine for cosine": ("return radius * c, radius * s", "return radius * s, radius * c"),
    "the order of the four": ("tl.join(tl.join(n0, n2), tl.join(n1, n3))", "tl.join(tl.join(n0, n1), tl.join(n2, n3))"),
    "the counter's offset": ("philox(key, first + tl", "philox(key, tl"),
    "signal": ("a * clean + b * noise", "clean + b * noise"),
    "sigma": ("a * clean + b * noise", "a * clean + noise"),
    "signal for sigma": ("a * clean + b * noise", "b * clean + a * noise"),
    "the target's signal": ("a * noise - b * clean", "noise - b * clean"),
    "the target's sigma": ("a * noise - b * clean", "a * noise - clean"),
    "the target's sign": ("a * noise - b * clean", "a * noise + b * clean"),
    "the velocity's sample": ("noise = noise - clean", "noise = noise"),
    "the square": ("total += difference * difference", "total += difference"),
    "the mean": ("tl.sum(total, 0) / COUNT", "tl.sum(total, 0)"),
    "a chunk's first element": ("chunk * CHUNK + first", "first"),
    "a chunk's part": ("chunk * tl.num_programs(0) + sample", "sample"),
    "the weight": ("mean = mean * tl.load(weight + sample)", "mean = mean"),
    "the two of the gradient": ("* 2.0 / COUNT", "/ COUNT"),
    "the mean, backward": ("* 2.0 / COUNT", "* 2.0"),
    "the weight, backward": ("slope = slope * tl.load(weight + sample)", "slope = slope"),
    "the gradient that is given": ("tl.load(grad + sample) * 2.0", "2.0"),
    "the sign, backward": ("(slope * difference).to", "(-slope * difference).to"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.noise import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="value|gradient"):
        for target in TARGETS:
            check_mix(target, draw(2, 4, 17, 17))
        check_error(draw(3, 3, 5, 5), 0.5 + torch.rand(3))
        if "chunk" in fault:
            check_error(draw(2, 17000), None)
