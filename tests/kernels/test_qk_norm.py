"""Norm of queries and keys into one sequence: the Triton kernels, in its interpreter, against float64 in torch."""

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
from megadit_kernels import qk_norm

HEADS = {36: 8, 64: 2, 72: 4, 128: 3}  # by head dim: 288 channels, a share of 1024 on 8 ranks, of 1152 on 4, odd


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    need_interpreter()
    qk_norm.select("fused")
    yield
    qk_norm.select("auto")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def operands(
    batch: int,
    tokens: int,
    text: int | None,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    normed: bool = True,
) -> dict[str, Tensor]:
    """Leaves: image, context where there is ``text``, and the gains of both."""
    torch.manual_seed(0)
    leaves = {"image": draw(batch, tokens, 3, heads, head_dim, dtype=dtype)}
    if text is not None:
        leaves["context"] = draw(batch, text, 3, heads, head_dim, dtype=dtype)
    if normed:
        for name in [f"{stream} {which}" for stream in leaves for which in "qk"]:
            leaves[name] = draw(head_dim, dtype=dtype)
    return leaves


def call(op: Any, leaves: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    gains = [
        (leaves[f"{stream} q"], leaves[f"{stream} k"]) if f"{stream} q" in leaves else None
        for stream in ("image", "context")
    ]
    return op(leaves["image"], leaves.get("context"), *gains, **options)


def check(leaves: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    """Values and all gradients against float64; errors relative to the largest value."""
    outputs = call(qk_norm, leaves, **options)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = call(qk_norm.reference, wide, **options)
    given = [torch.randn_like(part) for part in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    exact_grads = torch.autograd.grad(expected, list(wide.values()), [part.double() for part in given])
    names = [*"qkv", *(f"gradient of {name}" for name in leaves)]
    for name, part, exact in zip(names, (*outputs, *grads), (*expected, *exact_grads), strict=True):
        assert part.shape == exact.shape and part.dtype == leaves["image"].dtype, name
        error = (part.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("text", [None, 3])
@pytest.mark.parametrize("head_dim", list(HEADS))
def test_values_and_gradients_at_every_head_dim(head_dim: int, text: int | None) -> None:
    check(operands(2, 5, text, HEADS[head_dim], head_dim), 2e-6)


@pytest.mark.parametrize("heads", [1, 2, 9, 16])
def test_shares_of_the_heads(heads: int) -> None:
    check(operands(2, 7, 3, heads, 72), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    check(operands(2, 33, 5, 4, 72, dtype), 2**-8 if dtype == torch.bfloat16 else 2**-10)


def test_gains_of_another_dtype_than_the_stream() -> None:
    leaves = {
        name: leaf.detach().bfloat16().requires_grad_() if leaf.ndim > 1 else leaf
        for name, leaf in operands(1, 9, 3, 2, 36).items()
    }
    grads = torch.autograd.grad(call(qk_norm, leaves)[0].float().sum(), list(leaves.values()), allow_unused=True)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves.values()]


def test_without_the_contexts_queries() -> None:
    """The last block of MMDiT: no queries of the text, whose gradients are zeros and not missing."""
    leaves = operands(2, 6, 4, 2, 36)
    check(leaves, 2e-6, context_queries=False)
    q, k, v = call(qk_norm, leaves, context_queries=False)
    assert q.shape == (2, 6, 2, 36) and k.shape == v.shape == (2, 10, 2, 36)
    gain, context = torch.autograd.grad(q.sum() + k.sum(), [leaves["context q"], leaves["context"]])
    assert not gain.any() and not context[:, :, 0].any() and context[:, :, 1].any()


def test_without_a_norm_it_only_moves() -> None:
    leaves = operands(2, 5, 3, 4, 36, normed=False)
    outputs, expected = call(qk_norm, leaves), call(qk_norm.reference, leaves)
    given = [torch.randn_like(part) for part in outputs]
    grads, exact = (torch.autograd.grad(parts, list(leaves.values()), given) for parts in (outputs, expected))
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *grads), (*expected, *exact), strict=True))


def test_many_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows per program, and more partial sums than are added at a time."""
    from megadit_kernels.qk_norm import fused

    monkeypatch.setattr(fused, "_PROGRAMS", 20)
    monkeypatch.setattr(fused, "_ELEMENTS", 512)
    check(operands(1, 40, 17, 4, 72), 3e-6)


def test_projections_are_read_where_they_are() -> None:
    """Slices of a wider output, and gradients that lie heads first, as attention leaves them."""
    leaves = operands(2, 5, 3, 2, 36)
    wide = torch.randn(2, 7, 4, 3, 2, 36)
    strided = {**leaves, "image": wide[:, 1:6, 2].detach().requires_grad_()}
    plain = {**leaves, "image": wide[:, 1:6, 2].detach().clone().requires_grad_()}
    turned = {**leaves, "image": wide[:, 1:6, 2].transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()}
    given = [torch.randn(2, 2, 8, 36).transpose(1, 2), torch.randn(2, 8, 2, 36), torch.tensor(2.0).expand(2, 8, 2, 36)]
    results = []
    for case in (strided, plain, turned):
        outputs = call(qk_norm, case)
        results.append((*outputs, *torch.autograd.grad(outputs, list(case.values()), given)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_empty_batches_and_empty_text() -> None:
    for batch, text in ((0, 3), (2, 0)):
        leaves = operands(batch, 4, text, 2, 36)
        outputs = call(qk_norm, leaves)
        grads = torch.autograd.grad([part.sum() for part in outputs], list(leaves.values()))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]
        assert not grads[-1].any(), "nothing has passed the context's gain"


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    leaves = operands(3, 70, 9, 4, 72)
    q, k, v = call(qk_norm, leaves)
    alone = {name: leaf[1:2, :1] if leaf.ndim == 5 else leaf for name, leaf in leaves.items()}
    for part, one in zip((q, k, v), call(qk_norm, alone), strict=True):
        assert torch.equal(part[1, 0], one[0, 0]) and torch.equal(part[1, 70], one[0, 1])


def test_the_backward_pass_is_the_same_bits_each_time() -> None:
    leaves = operands(2, 130, 9, 2, 36)
    runs = [
        torch.autograd.grad([part.square().sum() for part in call(qk_norm, leaves)], list(leaves.values()))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("head_dim", [36, 72, 128])
def test_nothing_is_read_or_written_outside(head_dim: int, queries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    leaves = {
        name: arena.operand(leaf.detach()).requires_grad_()
        for name, leaf in operands(2, 5, 3, 3, head_dim, torch.bfloat16).items()
    }
    with arena.allocating(monkeypatch):
        outputs = call(qk_norm, leaves, context_queries=queries)
        given = [arena.operand(torch.randn(part.shape).bfloat16()) for part in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    arena.check()
    assert all(part.isfinite().all() for part in (*outputs, *grads)), "a guard was read, or an element not written"


@pytest.mark.parametrize(
    ("tokens", "text", "heads", "head_dim"),
    [pytest.param(256, 120, 8, 36, marks=pytest.mark.slow), (256, 120, 4, 72), (256, 120, 2, 128)],
    ids=str,
)
def test_bytes_moved_are_close_to_the_floor(tokens: int, text: int, heads: int, head_dim: int, root: Path) -> None:
    """Each input once and each output once; on top are the partial sums of the gains' gradients."""
    leaves = operands(1, tokens, text, heads, head_dim, torch.bfloat16)
    with counted() as launches:
        outputs = call(qk_norm, leaves)
    assert [launch.name for launch in launches] == ["forward"]
    forward = launches[0].bytes / nbytes(*leaves.values(), *outputs)
    programs = [launches[0].programs]
    given = [torch.randn_like(part) for part in outputs]
    with counted() as launches:
        torch.autograd.grad(outputs, list(leaves.values()), given)
    assert [launch.name for launch in launches] == ["backward", "add_partials"]
    streams = nbytes(leaves["image"], leaves["context"])
    gains = nbytes(*leaves.values()) - streams
    backward = sum(launch.bytes for launch in launches) / (streams * 2 // 3 + nbytes(*given) + streams + 2 * gains)
    programs.append(launches[0].programs)
    assert forward <= 1.02 and backward <= 1.10, (forward, backward)
    row = (
        f"| {tokens} + {text} × {heads} × {head_dim} | {forward:.3f} | {backward:.3f} | {programs[0]} / {programs[1]} |"
    )
    assert row in (root / "docs" / "kernels.md").read_text(encoding="utf-8"), row


def test_shapes_alone_on_the_meta_device() -> None:
    leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in operands(2, 5, 3, 2, 36).items()}
    grads = torch.autograd.grad([part.sum() for part in call(qk_norm, leaves)], list(leaves.values()))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]


def test_the_operator_keeps_torchs_contract() -> None:
    from megadit_kernels.qk_norm import fused

    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for text, normed, queries in ((3, True, False), (3, False, True), (None, True, True)):
        leaves = operands(2, 5, text, 2, 36, normed=normed)
        gains = [leaves.get(f"{stream} {which}") for stream in ("image", "context") for which in "qk"]
        arguments = (leaves["image"], leaves.get("context"), *gains, queries, 1e-6)
        torch.library.opcheck(fused.run.forward, arguments, test_utils=utilities)


@pytest.mark.parametrize("text", [None, 3])
def test_compiled_whole_it_is_the_eager_operation(text: int | None) -> None:
    leaves = operands(2, 5, text, 2, 36)

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        q, k, v = call(qk_norm, leaves)
        return (q * k).square().sum() + v.square().sum()

    eager = torch.autograd.grad(loss(leaves), list(leaves.values()))
    with compiling():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves)
        grads = torch.autograd.grad(compiled, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(eager, grads, strict=True))


def test_fake_cuda_tensors_take_the_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megadit_kernels.qk_norm import fused

    with FakeTensorMode(), torch.no_grad():
        image = torch.empty(2, 6, 3, 4, 36, device="cuda", dtype=torch.bfloat16)
        context = torch.empty(2, 3, 3, 4, 36, device="cuda", dtype=torch.bfloat16)
        gain = torch.empty(36, device="cuda", dtype=torch.bfloat16)
        q, k, v = qk_norm(image, context, (gain, gain), (gain, gain))
        assert all(part.shape == (2, 9, 4, 36) and part.is_contiguous() for part in (q, k, v))
        assert {part.dtype for part in (q, k, v)} == {torch.bfloat16} and q.device.type == "cuda"
        heads_first = torch.empty(2, 4, 9, 36, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        dimage, dcontext, sums = fused.run.backward(
            heads_first, k, v, image, context, gain, gain, gain, gain, 6, True, 1e-6
        )
        assert dimage.shape == image.shape and dcontext.shape == context.shape
        assert sums.shape == (2, 2, 36) and sums.dtype == torch.bfloat16


# What a slip of the pen would leave out or swap, in the forward and the backward kernels.
FAULTS = {
    "the gain": ("inverse[:, None] * _gain(gain, columns, D)", "inverse[:, None]"),
    "the norm": ("value * inverse[:, None] * _gain", "value * _gain"),
    "eps": ("/ D + eps)\n        value = value", "/ D)\n        value = value"),
    "keys for queries": ("_move(source + H * D, k_gain", "_move(source, k_gain"),
    "the gain of queries on keys": ("_move(source + H * D, k_gain", "_move(source + H * D, q_gain"),
    "the context behind the image": (
        "context_tokens,\n            image_tokens, joint",
        "context_tokens,\n            0, joint",
    ),
    "the image's gain on the context": (
        "context, context_q_gain, context_k_gain, q, k, v, program",
        "context, image_q_gain, context_k_gain, q, k, v, program",
    ),
    "the gain, backward": ("inner = grad * _gain(gain, columns, D)", "inner = grad"),
    "the spread, backward": ("inverse * (inner - normed * along)", "inverse * inner"),
    "1 / spread, backward": ("inverse * (inner - normed * along)", "(inner - normed * along)"),
    "the gain's gradient": ("along), grad * normed", "along), grad"),
    "keys for queries, backward": ("_through_norm(qkv + at + H * D", "_through_norm(qkv + at"),
    "keys' gradients for queries'": ("source = dq + (sample * dq_batch", "source = dk + (sample * dq_batch"),
    "keys' gradients for values'": ("source = dv + (sample * dv_batch", "source = dk + (sample * dv_batch"),
    "keys' sum for queries'": ("partial + across, tl.sum(q_sum, 0)", "partial + across, tl.sum(k_sum, 0)"),
    "a block of partial sums": ("range(first, last, ROWS)", "range(first, last - ROWS, ROWS)"),
    "the context's position, backward": (
        "context_rows, context_tokens, image_tokens, context_batch",
        "context_rows, context_tokens, 0, context_batch",
    ),
    "the context's gain, backward": (
        "context, context_q_gain, context_k_gain, dcontext",
        "context, context_q_gain, image_k_gain, dcontext",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.qk_norm import fused

    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="^[qkv]:|gradient"):
        check(operands(2, 30, 20, 2, 36), 2e-6, eps=1e-2)
