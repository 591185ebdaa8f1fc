"""Every fused operation as a GPU computes it: against float64, against torch, the same bits twice, within its memory.

The operands are those of benchmarks/kernel_cases.py, with an entry for every operation (test_fake_cuda.py), so that
a new operation is covered by itself. Without a GPU the same checks run in Triton's interpreter at a small size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import CASES, Draw, Shape, detached, fused_ops, nbytes
from helpers.kernels.interpreter import need_interpreter

FUSED = fused_ops()
# Relative to the largest value: one rounding of the result, and for half precision a rounded operand besides.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
GPU_SHAPES = [
    Shape(4, 256, 288), Shape(3, 333, 1152), Shape(1, 77, 5120),
    Shape(2, 129, 576), Shape(2, 64, 2560), Shape(2, 65, 36),
]  # fmt: skip
SHAPES = [
    pytest.param("cpu", Shape(2, 9, 96), id="interpreter"),
    *(pytest.param("cuda", shape, id=f"{shape.width}", marks=pytest.mark.gpu) for shape in GPU_SHAPES),
]


@pytest.fixture(autouse=True)
def _fused(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.node.get_closest_marker("gpu"):
        need_interpreter()
    for op in FUSED.values():
        op.select("fused")
    yield
    for op in FUSED.values():
        op.select("auto")


def results_and_gradients(function: Any, name: str, leaves: dict[str, Tensor], given: list[Tensor]) -> list[Tensor]:
    results = CASES[name].results(function, leaves)
    grads = torch.autograd.grad(results, list(leaves.values()), given)
    return [*(part.detach() for part in results), *grads]


def draw(name: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The operands, and normal gradients of the results."""
    leaves = detached(CASES[name].leaves(shape, Draw(dtype, device).tensors()))
    with torch.no_grad():
        results = CASES[name].results(FUSED[name].reference, leaves)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(part.shape, generator=generator).to(device, dtype) for part in results]
    return leaves, given


# Each compiles kernels for a second or more: bfloat16 at every width, the other dtypes at one or two.
CASES_BY_DTYPE = [
    *(pytest.param("cpu", Shape(2, 9, 96), dtype, id=f"interpreter-{dtype}") for dtype in TOLERANCE),
    *(
        pytest.param("cuda", shape, dtype, id=f"{shape.width}-{dtype}", marks=pytest.mark.gpu)
        for dtype, shapes in (
            (torch.bfloat16, GPU_SHAPES),
            (torch.float32, GPU_SHAPES[:2]),
            (torch.float16, GPU_SHAPES[:1]),
        )
        for shape in shapes
    ),
]


@pytest.mark.parametrize(("device", "shape", "dtype"), CASES_BY_DTYPE)
@pytest.mark.parametrize("name", list(FUSED))
def test_values_and_gradients(name: str, device: str, shape: Shape, dtype: torch.dtype) -> None:
    """Of the fused operation, and no further from float64 than twice what torch's own operations are."""
    leaves, given = draw(name, shape, dtype, device)
    exact = results_and_gradients(
        FUSED[name].reference, name, detached(leaves, torch.float64), [part.double() for part in given]
    )
    torch_parts = results_and_gradients(FUSED[name].reference, name, detached(leaves), given)
    fused = results_and_gradients(FUSED[name], name, leaves, given)
    for index, (part, theirs, value) in enumerate(zip(fused, torch_parts, exact, strict=True)):
        assert part.dtype == dtype and part.shape == value.shape
        scale = value.abs().max().clamp(min=1e-30)
        error, torch_error = ((other.double() - value).abs().max() / scale for other in (part, theirs))
        assert error <= max(TOLERANCE[dtype], 2 * float(torch_error)), f"{name}, part {index}: {float(error):.2e}"


@pytest.mark.parametrize(("device", "shape"), SHAPES)
@pytest.mark.parametrize("name", list(FUSED))
def test_twice_gives_the_same_bits(name: str, device: str, shape: Shape) -> None:
    leaves, given = draw(name, shape, torch.bfloat16, device)
    first, second = (results_and_gradients(FUSED[name], name, leaves, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("device", "shape"), SHAPES)
@pytest.mark.parametrize("name", list(FUSED))
def test_a_sample_does_not_depend_on_its_batch(name: str, device: str, shape: Shape) -> None:
    leaves, _ = draw(name, shape, torch.bfloat16, device)
    samples = {leaf.shape[0] for leaf in leaves.values()}
    if samples != {shape.samples} or shape.samples == 1:
        pytest.skip("an operand that all samples share, or one sample")
    whole = CASES[name].results(FUSED[name], leaves)
    alone = CASES[name].results(FUSED[name], {key: leaf[1:2] for key, leaf in leaves.items()})
    assert all(torch.equal(part[1:2], one) for part, one in zip(whole, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FUSED))
def test_memory_is_results_gradients_and_little_more(name: str) -> None:
    """At most a tenth beyond what the pass must allocate; torch's own operations keep more than that between them."""
    leaves, given = draw(name, Shape(8, 256, 1152), torch.bfloat16, "cuda")
    results_and_gradients(FUSED[name], name, leaves, given)  # compiles, and workspaces are there afterwards
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    parts = results_and_gradients(FUSED[name], name, leaves, given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * nbytes(*parts) + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FUSED))
def test_auto_is_fused_and_compiles_whole(name: str) -> None:
    """On a GPU the default takes the kernel; torch.compile with inductor gives what eager mode gives."""
    from helpers.compiler import compiling

    op = FUSED[name]
    op.select("auto")
    assert op.backend_on("cuda") == "fused"
    leaves, given = draw(name, Shape(2, 64, 288), torch.bfloat16, "cuda")
    eager = results_and_gradients(op, name, leaves, given)
    with compiling():
        compiled = torch.compile(lambda leaves: CASES[name].results(op, leaves), fullgraph=True)
        parts = compiled(leaves)
        grads = torch.autograd.grad(parts, list(leaves.values()), given)
    for ours, theirs in zip((*parts, *grads), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a reference whose gate is left out is far from the kernel."""
    name = "gated_residual"
    leaves, given = draw(name, Shape(2, 9, 96), torch.float32, "cpu")
    fused = results_and_gradients(FUSED[name], name, leaves, given)
    wrong = results_and_gradients(
        lambda x, gate, branch: x + branch + 0 * gate.unsqueeze(1), name, detached(leaves), given
    )
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(fused, wrong, strict=True)]
    assert max(errors) > 0.1
