"""Gated residual, norm and modulation: the Triton kernels, in its interpreter, against float64 in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import nbytes
from helpers.compiler import compiling
from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit_kernels import gated_residual, norm_modulate, residual_norm_modulate
from megadit_kernels.norm_modulate import reference

WIDTHS = (100, 144, 288, 576, 1152, 1536, 2560, 5120, 8192)
OPS = (gated_residual, norm_modulate, residual_norm_modulate)


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    need_interpreter()
    for op in OPS:
        op.select("fused")
    yield
    for op in OPS:
        op.select("auto")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def operands(
    batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, *, rows: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Leaves x, branch, modulation (batch, 6 width), and table (6, width), of which the op reads rows 2, 3 and 4."""
    torch.manual_seed(seed)
    leaves = {
        "x": draw(batch, tokens, width, dtype=dtype),
        "branch": draw(batch, tokens, width, dtype=dtype),
        "modulation": draw(batch, 6 * width, dtype=dtype),
    }
    if rows:
        leaves["table"] = draw(6, width, dtype=dtype)
    return leaves


def call(op: Any, leaves: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    width = leaves["x"].shape[-1]
    gate, shift, scale = leaves["modulation"].chunk(6, dim=1)[2:5]
    if "table" in leaves:
        gate_row, shift_row, scale_row = leaves["table"].unbind(0)[2:5]
        options.update(gate_row=gate_row, shift_row=shift_row, scale_row=scale_row)
    assert gate.stride(0) == 6 * width, "read in place"
    return op(leaves["x"], gate, leaves["branch"], shift, scale, **options)


def check(leaves: dict[str, Tensor], *, tolerance: float, **options: Any) -> None:
    """Values and all gradients against float64; errors relative to the largest value."""
    outputs = call(residual_norm_modulate, leaves, **options)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = call(reference.residual_norm_modulate, wide, **options)
    given = [torch.randn_like(part) for part in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    expected_grads = torch.autograd.grad(expected, list(wide.values()), [part.double() for part in given])
    names = ["new x", "y", *(f"gradient of {name}" for name in leaves)]
    for name, part, exact in zip(names, (*outputs, *grads), (*expected, *expected_grads), strict=True):
        error = (part.double() - exact).abs().max() / exact.abs().max()
        assert part.dtype == leaves["x"].dtype and error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients_at_every_width(width: int, norm: str) -> None:
    check(operands(2, 5, width), tolerance=2e-6, norm=norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """y is that of the residual as stored; two roundings of bfloat16 are 2 ** -8 of the largest value at most."""
    check(operands(2, 33, 288, dtype), tolerance=2**-8 if dtype == torch.bfloat16 else 2**-10)


def test_rows_that_all_samples_share() -> None:
    check(operands(3, 7, 144, rows=True), tolerance=2e-6)


def test_many_chunks_of_one_sample_add_up() -> None:
    check(operands(1, 150, 144), tolerance=2e-6)


def test_without_a_branch_or_without_a_norm() -> None:
    """The first and the last site of a stage: the norm alone, and the gated residual alone."""
    leaves = operands(2, 9, 144)
    x, branch = leaves["x"], leaves["branch"]
    gate, shift, scale = leaves["modulation"].chunk(6, dim=1)[2:5]
    exact = [part.detach().double().requires_grad_() for part in (x, branch, gate, shift, scale)]
    ex, ebranch, egate, eshift, escale = exact
    pairs = [
        (norm_modulate(x, shift, scale), reference.norm_modulate(ex, eshift, escale), (x, shift, scale), (0, 3, 4)),
        (gated_residual(x, gate, branch), reference.gated_residual(ex, egate, ebranch), (x, gate, branch), (0, 2, 1)),
        (gated_residual(x, None, branch), reference.gated_residual(ex, None, ebranch), (x, branch), (0, 1)),
    ]
    for output, expected, inputs, at in pairs:
        given = torch.randn_like(output)
        grads = torch.autograd.grad(output, inputs, given, retain_graph=True)
        expected_grads = torch.autograd.grad(expected, [exact[i] for i in at], given.double())
        for part, value in zip((output, *grads), (expected, *expected_grads), strict=True):
            torch.testing.assert_close(part.double(), value, rtol=0, atol=3e-6 * float(value.detach().abs().max()))


def affine_operands(
    batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, gain_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, branch = draw(batch, tokens, width, dtype=dtype), draw(batch, tokens, width, dtype=dtype)
    return {"x": x, "branch": branch, **{name: draw(width, dtype=gain_dtype or dtype) for name in ("gain", "bias")}}


def affine(op: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """U-ViT's form: no gate, the gain is the factor itself, nothing is the sample's own."""
    rows = {"shift_row": leaves["bias"], "scale_row": leaves["gain"], "eps": 1e-5, "one": 0.0}
    return op(leaves["x"], None, leaves["branch"], None, None, **rows)


def check_affine(leaves: dict[str, Tensor], tolerance: float) -> None:
    """Values and all gradients against float64, by torch's own LayerNorm; errors relative to the largest value."""
    new_x, y = outputs = affine(residual_norm_modulate, leaves)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact_x = wide["x"] + wide["branch"]
    exact_y = torch.nn.functional.layer_norm(exact_x, exact_x.shape[-1:], wide["gain"], wide["bias"], 1e-5)
    given = [torch.randn_like(part) for part in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    exact_grads = torch.autograd.grad((exact_x, exact_y), list(wide.values()), [part.double() for part in given])
    dtypes = [new_x.dtype, y.dtype, *(leaf.dtype for leaf in leaves.values())]
    names = ["new x", "y", *(f"gradient of {name}" for name in leaves)]
    for name, part, exact, dtype in zip(
        names, (*outputs, *grads), (exact_x, exact_y, *exact_grads), dtypes, strict=True
    ):
        error = (part.double() - exact).abs().max() / exact.abs().max()
        assert part.dtype == dtype and error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("width", [100, 144, 288, 1152, pytest.param(5120, marks=pytest.mark.slow)])
def test_a_plain_affine_norm_after_a_plain_residual(width: int) -> None:
    check_affine(affine_operands(2, 5 if width > 300 else 37, width), tolerance=2e-6)


@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32])
def test_gain_and_bias_have_gradients_in_their_own_dtype(gain_dtype: torch.dtype) -> None:
    check_affine(affine_operands(2, 33, 288, torch.bfloat16, gain_dtype), tolerance=2**-8)


def test_gradients_of_gain_and_bias_are_the_same_bits_each_time_and_of_no_batch_zero() -> None:
    leaves = affine_operands(5, 70, 144)
    inputs = list(leaves.values())
    runs = []
    for _ in range(2):
        new_x, y = affine(residual_norm_modulate, leaves)
        runs.append(torch.autograd.grad(new_x.square().sum() + y.square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    empty = affine_operands(0, 70, 144)
    grads = torch.autograd.grad(affine(residual_norm_modulate, empty)[1].sum(), list(empty.values()))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in empty.values()]
    assert not any(grad.any() for grad in grads)


def test_on_torch_an_affine_norm_is_its_own_bit_for_bit() -> None:
    """One call of F.layer_norm, in float32 where asked for; so pins of U-ViT hold."""
    for dtype, float32 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        x, _, gain, bias = (leaf.detach() for leaf in affine_operands(2, 5, 144, dtype).values())
        for op in OPS:
            op.select("auto")
        y = norm_modulate(x, None, None, shift_row=bias, scale_row=gain, eps=1e-5, one=0.0, float32=float32)
        operands = (x.float(), gain.float(), bias.float()) if float32 else (x, gain, bias)
        wide, *rows = operands
        assert torch.equal(y, torch.nn.functional.layer_norm(wide, (144,), *rows, 1e-5).to(dtype))


def test_a_result_that_nobody_uses_asks_for_no_gradient() -> None:
    leaves = operands(2, 5, 144)
    new_x, y = call(residual_norm_modulate, leaves)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected_x, expected_y = call(reference.residual_norm_modulate, wide)
    for output, expected in ((new_x, expected_x), (y, expected_y)):
        grads = torch.autograd.grad(output.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        values = torch.autograd.grad(expected.sum(), list(wide.values()), retain_graph=True, allow_unused=True)
        for grad, value in zip(grads, values, strict=True):
            torch.testing.assert_close(grad.double(), value, rtol=1e-4, atol=1e-4)


def test_strided_operands_are_read_where_they_are() -> None:
    """Of a (tokens, batch, n) layout, as sequence-parallel code has it, and gradients that are expanded scalars."""
    leaves = operands(2, 9, 144)
    turned = leaves["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    plain, other = (call(residual_norm_modulate, {**leaves, "x": x}) for x in (leaves["x"], turned))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    grads = [
        torch.autograd.grad(pair[0].sum() + pair[1].sum(), (x, leaves["branch"]), retain_graph=True)
        for pair, x in ((plain, leaves["x"]), (other, turned))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_empty_batches_and_no_tokens() -> None:
    for batch, tokens in ((0, 4), (2, 0)):
        leaves = operands(batch, tokens, 144)
        outputs = call(residual_norm_modulate, leaves)
        assert all(part.shape == (batch, tokens, 144) for part in outputs)
        grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), list(leaves.values()))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]
        assert all(not grad.any() for grad in grads)


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    leaves = operands(3, 70, 288)
    outputs = call(residual_norm_modulate, leaves)
    alone = call(
        residual_norm_modulate, {name: leaf[1:2, :1] if leaf.ndim == 3 else leaf[1:2] for name, leaf in leaves.items()}
    )
    assert all(torch.equal(one, part[1:2, :1]) for one, part in zip(alone, outputs, strict=True))


def test_the_backward_pass_is_the_same_bits_each_time() -> None:
    leaves = operands(2, 130, 144)
    runs = []
    for _ in range(2):
        new_x, y = call(residual_norm_modulate, leaves)
        runs.append(torch.autograd.grad(new_x.square().sum() + y.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("width", [100, 288, 1536])
@pytest.mark.parametrize("rows", [False, True])
def test_nothing_is_read_or_written_outside(width: int, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    leaves = {
        name: arena.operand(leaf.detach()).requires_grad_()
        for name, leaf in operands(2, 5, width, torch.bfloat16, rows=rows).items()
    }
    given = [arena.operand(torch.randn(2, 5, width).bfloat16()) for _ in range(2)]
    with arena.allocating(monkeypatch):
        outputs = call(residual_norm_modulate, leaves)
        grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    arena.check()
    assert all(part.isfinite().all() for part in (*outputs, *grads)), "a guard was read, or an element not written"


@pytest.mark.parametrize(
    ("batch", "width"),
    [(1, 288), *(pytest.param(batch, 1152, marks=pytest.mark.slow) for batch in (1, 8))],
    ids=str,
)
def test_bytes_moved_are_close_to_the_floor(batch: int, width: int, root: Path) -> None:
    """Each input once and each output once; saved statistics and partial sums are what comes on top."""
    leaves = operands(batch, 256, width, torch.bfloat16)
    vector = 2 * batch * width  # bytes of a shift, scale or gate; of the modulation's six three are read
    with counted() as launches:
        outputs = call(residual_norm_modulate, leaves)
    floor = nbytes(leaves["x"], leaves["branch"], *outputs) + 3 * vector
    forward, programs = sum(launch.bytes for launch in launches) / floor, [launches[0].programs]
    assert forward <= 1.02
    given = [torch.randn_like(part) for part in outputs]
    with counted() as launches:
        torch.autograd.grad(outputs, list(leaves.values()), given)
    floor = nbytes(*given, outputs[0], *(leaves[name] for name in ("x", "branch", "branch"))) + 5 * vector
    assert [launch.name for launch in launches] == ["backward", "add_partials"]
    backward = sum(launch.bytes for launch in launches) / floor
    assert backward <= 1.10
    programs.append(launches[0].programs)
    row = f"| {batch} × 256 × {width} | {forward:.3f} | {backward:.3f} | {programs[0]:,} / {programs[1]:,} |"
    assert row in (root / "docs" / "kernels.md").read_text(encoding="utf-8"), row


def test_bytes_of_an_affine_norm_are_close_to_the_floor() -> None:
    leaves = affine_operands(2, 256, 288, torch.bfloat16)
    with counted() as launches:
        outputs = affine(residual_norm_modulate, leaves)
    rows = nbytes(leaves["gain"], leaves["bias"])
    floor = nbytes(leaves["x"], leaves["branch"], *outputs) + rows
    assert sum(launch.bytes for launch in launches) <= 1.02 * floor
    given = [torch.randn_like(part) for part in outputs]
    with counted() as launches:
        torch.autograd.grad(outputs, list(leaves.values()), given)
    assert [launch.name for launch in launches] == ["backward", "add_partials", "add_partials"]
    floor = nbytes(*given, outputs[0], leaves["x"]) + 2 * rows  # of x and branch the gradient is one
    assert sum(launch.bytes for launch in launches) <= 1.10 * floor


def test_shapes_alone_on_the_meta_device() -> None:
    leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in operands(2, 5, 144).items()}
    outputs = call(residual_norm_modulate, leaves)
    grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), list(leaves.values()))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]


def arguments(leaves: dict[str, Tensor]) -> tuple[Any, ...]:
    gate, shift, scale = leaves["modulation"].chunk(6, dim=1)[2:5]
    return leaves["x"], leaves["branch"], gate, None, shift, None, scale, None, 1e-6, "layer", 1.0


def test_the_operator_keeps_torchs_contract() -> None:
    from megadit_kernels.norm_modulate import fused

    leaves = operands(2, 5, 144)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused.run.forward, arguments(leaves), test_utils=utilities)


def test_compiled_whole_it_is_the_eager_operation() -> None:
    leaves = operands(2, 5, 144, rows=True)

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        new_x, y = call(residual_norm_modulate, leaves)
        return new_x.square().sum() + call(residual_norm_modulate, {**leaves, "x": y})[1].square().sum()

    eager = torch.autograd.grad(loss(leaves), list(leaves.values()))
    with compiling():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves)
        grads = torch.autograd.grad(compiled, list(leaves.values()))
    assert torch.equal(compiled, loss(leaves))
    assert all(torch.equal(a, b) for a, b in zip(eager, grads, strict=True))


def test_fake_cuda_tensors_take_the_operator() -> None:
    """As on a GPU: shapes, strides and dtypes of forward and backward, without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megadit_kernels.norm_modulate import fused

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 6, 144, device="cuda", dtype=torch.bfloat16)
        modulation = torch.empty(2, 6 * 144, device="cuda", dtype=torch.bfloat16)
        gate, shift, scale = modulation.chunk(6, dim=1)[2:5]
        new_x, y = residual_norm_modulate(x, gate, x, shift, scale)
        assert new_x.device.type == y.device.type == "cuda" and new_x.shape == y.shape == x.shape
        assert new_x.dtype == y.dtype == torch.bfloat16 and y.is_contiguous()
        mean = torch.empty(2, 6, device="cuda")
        saved = (gate, None, scale, None, mean, mean, "layer", 1.0)
        dx, dbranch, sums, row_sums = fused.run.backward(new_x, y, y, x, *saved)
        assert dx.shape == dbranch.shape == x.shape and sums.shape == (2, 3, 144) and sums.dtype == torch.bfloat16
        assert not row_sums.numel()
        rows = (None, None, None, torch.empty(144, device="cuda", dtype=torch.bfloat16), mean, mean, "layer", 0.0)
        sums, row_sums = fused.run.backward(new_x, y, y, None, *rows)[2:]
        assert sums.dtype == torch.float32 and row_sums.shape == (2, 144) and row_sums.dtype == torch.bfloat16


# What a slip of the pen would leave out or swap, in the forward and the backward kernel.
FAULTS = {
    "the gate": ("added *= _per_sample(", "added += 0.0 * _per_sample("),
    "the new residual is stored": ("rounded = (value + added)", "rounded = (value)"),
    "the factor": ("value = value * inverse * _per_sample(", "value = value * inverse + 0.0 * _per_sample("),
    "the one of 1 + scale": ("scale_at, columns, inside, ONE)", "scale_at, columns, inside, 0.0)"),
    "the shift": ("value += _per_sample(shift, shift_row,", "value += 0.0 * _per_sample(shift, shift_row,"),
    "shift for scale": (
        "_per_sample(scale, scale_row, scale_at, columns",
        "_per_sample(shift, scale_row, shift_at, columns",
    ),
    "the centre": ("a = tl.where(left < N, a - centre, 0.0)", "a = tl.where(left < N, a, 0.0)"),
    "eps": ("squares / N + eps", "squares / N"),
    "the factor, backward": ("return value, grad, grad * factor", "return value, grad, grad"),
    "the mean, backward": ("inner_a - across - hat_a * along", "inner_a - hat_a * along"),
    "the spread, backward": ("inner_a - across - hat_a * along", "inner_a - across"),
    "the residual's own gradient": ("total += tl.load(dnew", "total += 0.0 * tl.load(dnew"),
    "the gate, backward": ("(total * gate).to(", "(total).to("),
    "the branch in the gate's gradient": ("total *= tl.load(branch", "total += 0.0 * tl.load(branch"),
    "shift's sum for scale's": ("scale_a += grad_a * hat_a", "scale_a += grad_a"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.norm_modulate import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="gradient|new x|y"):
        check(operands(2, 70, 128), tolerance=2e-6, eps=1e-2)


# Of the vectors that samples share, and of those of their own beside them.
ROW_FAULTS = {
    "a shared vector": ("total += tl.load(row + columns", "total += 0.0 * tl.load(row + columns"),
    "the sample's vector": ("total += tl.load(value + sample", "total += 0.0 * tl.load(value + sample"),
    "shift's row for scale's": (
        "_per_sample(scale, scale_row, scale_at, columns",
        "_per_sample(scale, shift_row, scale_at, columns",
    ),
}


@pytest.mark.parametrize("fault", list(ROW_FAULTS))
def test_a_fault_of_shared_vectors_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.norm_modulate import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *ROW_FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="gradient|new x|y"):
        check(operands(2, 20, 128, rows=True), tolerance=2e-6)
    if fault != "the sample's vector":
        with pytest.raises(AssertionError, match="gradient|new x|y"):
            check_affine(affine_operands(2, 20, 128), tolerance=2e-6)
