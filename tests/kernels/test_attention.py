"""Attention by lengths instead of a mask, by torch's operator and flash-attn's functions, against float64 by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compiler import WHOLE, compiling, graphs
from helpers.kernels.flash import BACKENDS, CALLS, flash_attn_2, flash_attn_3, flash_on_cpu
from helpers.kernels.interpreter import faulty
from megadit.config.schema.kernels import LARGEST_FLASH_HEAD_DIM
from megadit_kernels import attends_without_mask, attention, backends, choose_all, cumulative_lengths
from megadit_kernels.attention import LARGEST_HEAD_DIM, flash

TOKENS, TEXT = 9, 7
LENGTHS = {"odd": [5, 1, 3], "empty": [0, 7, 0], "full": [7, 7, 7], "one sample": [4]}


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> Iterator[str]:
    with flash_on_cpu(request.param):
        yield request.param


def draw(samples: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((samples, 3, rows, width) for rows in (queries, keys, keys))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, used_q: list[int], used_k: list[int]) -> Tensor:
    """Each sample's two parts, one by one, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    samples = []
    for i, (queries, keys) in enumerate(zip(used_q, used_k, strict=True)):
        parts = []
        for rows, columns in ((slice(None, queries), slice(None, keys)), (slice(queries, None), slice(keys, None))):
            scores = q[i, :, rows] @ k[i, :, columns].transpose(1, 2) / math.sqrt(q.shape[-1])
            parts.append(scores.softmax(-1) @ v[i, :, columns])
        samples.append(torch.cat(parts, dim=1))
    return torch.stack(samples)


def check(
    operands: list[Tensor], used_q: list[int], used_k: list[int], tolerance: float, function: Any = attention
) -> None:
    q, k, _ = operands
    cu_q = cumulative_lengths(torch.tensor(used_q), q.shape[2])
    cu_k = cu_q if used_k is used_q else cumulative_lengths(torch.tensor(used_k), k.shape[2])
    out, expected = function(*operands, None, cu_q, cu_k), by_hand(*operands, used_q, used_k)
    given = torch.randn(expected.shape, dtype=torch.float64).to(q.dtype)
    gradients = torch.autograd.grad(out, operands, given)
    exact = torch.autograd.grad(expected, operands, given.double())
    assert out.dtype == q.dtype and out.shape == q.shape
    for name, ours, theirs in zip(["out", "q", "k", "v"], (out, *gradients), (expected, *exact), strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("width", [36, 64])
def test_tokens_attend_to_tokens_and_padding_to_padding(backend: str, lengths: str, width: int) -> None:
    used = [TOKENS + length for length in LENGTHS[lengths]]
    check(draw(len(used), TOKENS + TEXT, TOKENS + TEXT, width), used, used, 1e-12)
    assert [name for name, _ in CALLS] == ["forward", "backward"] and CALLS[0][1][2] % 8 == 0


@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_queries_attend_to_the_texts_tokens(backend: str, lengths: str) -> None:
    """Cross-attention; a query without a key gives 0, and has no gradient."""
    used = LENGTHS[lengths]
    check(draw(len(used), TOKENS, TEXT, 20), [TOKENS] * len(used), used, 1e-12)


@pytest.mark.parametrize("width", [72, 128])
def test_some_queries_in_use_and_all_keys(backend: str, width: int) -> None:
    check(draw(2, 11, 11, width), [4, 4], [11, 7], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    check(draw(2, 16, 16, 64, dtype), [16, 10], [16, 10], 2**-6 if dtype == torch.bfloat16 else 2**-9)


@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_the_reference_is_the_same_by_a_mask(lengths: str) -> None:
    used = [TOKENS + length for length in LENGTHS[lengths]]
    check(draw(len(used), TOKENS + TEXT, TOKENS + TEXT, 36), used, used, 1e-12)
    check(draw(len(used), TOKENS, TEXT, 36), [TOKENS] * len(used), LENGTHS[lengths], 1e-12)


def test_where_sequences_begin_and_end() -> None:
    lengths = cumulative_lengths(torch.tensor([3, 0, 5], dtype=torch.int32), 5)
    assert lengths.dtype == torch.int32 and lengths.tolist() == [0, 3, 5, 5, 10, 15, 15]
    assert cumulative_lengths(torch.zeros(0, dtype=torch.int32), 5).tolist() == [0]


def test_no_row_is_copied_where_rows_lie_one_after_the_other() -> None:
    """As the joint layout of image and text and the output of a fused projection do; otherwise they are."""
    joint = torch.randn(2, 16, 3, 64)
    qkv = torch.randn(2, 16, 3, 3, 64)
    for rows in (joint, *qkv.unbind(2)):
        assert flash._rows(rows.transpose(1, 2)).data_ptr() == rows.data_ptr()
    assert torch.equal(flash._rows(joint[:, :9].transpose(1, 2)), joint[:, :9].reshape(18, 3, 64))
    assert flash._rows(torch.randn(2, 3, 5, 36)).shape == (10, 3, 40)


def test_attention_without_padding_is_torchs_or_flash_attns(backend: str) -> None:
    operands = draw(2, 6, 10, 36)
    expected = attention.reference(*operands)
    torch.testing.assert_close(attention(*operands), expected, rtol=1e-12, atol=1e-12)
    assert len(CALLS) == (0 if backend == "varlen" else 1)


def test_a_mask_goes_to_torch(backend: str) -> None:
    operands, mask = draw(2, 6, 6, 32), torch.rand(2, 1, 6, 6) < 0.7
    assert torch.equal(attention(*operands, mask), attention.reference(*operands, mask)) and not CALLS


def test_float32_large_heads_and_planned_layouts_go_to_torch() -> None:
    assert LARGEST_FLASH_HEAD_DIM == LARGEST_HEAD_DIM  # the configuration knows it without torch
    with flash_on_cpu("varlen"):
        assert attends_without_mask(torch.zeros(1), 256) and not attends_without_mask(torch.zeros(1), 264)
        assert not attends_without_mask(torch.zeros(1, device="meta"), 64)
        check(draw(1, 4, 4, 264), [4], [2], 1e-12)
        assert not CALLS
    assert not attends_without_mask(torch.zeros(1, dtype=torch.bfloat16), 64)
    attention.select("varlen")
    try:
        assert attends_without_mask(torch.zeros(1, dtype=torch.bfloat16), 64)
        assert not attends_without_mask(torch.zeros(1), 64)
        check([x.detach().float().requires_grad_() for x in draw(1, 4, 4, 64)], [3], [2], 1e-5)
    finally:
        attention.select("auto")


def test_a_graph_does_not_break(backend: str) -> None:
    operands = draw(2, 6, 6, 36, torch.float32)

    def function(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
        lengths = cumulative_lengths(used, q.shape[2])
        return attention(q, k, v, None, lengths, lengths).square().sum()

    used = torch.tensor([4, 6], dtype=torch.int32)
    expected = torch.autograd.grad(function(*operands, used), operands)
    with compiling():
        choose_all("cpu")  # before it is traced, as StagedModel does
        compiled = torch.compile(function, **WHOLE)
        gradients = torch.autograd.grad(compiled(*operands, used), operands)
        compiled(*operands, used.flip(0))
        assert graphs() == 1  # for other lengths, too
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", ["varlen", "flash-attn"])
def test_fake_cuda_tensors_reach_the_kernel(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks the device for a value: a fake tensor has none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(flash, "flash_attn_interface", flash_attn_2)
    seen = []
    original = flash._heads_first
    monkeypatch.setattr(flash, "_heads_first", lambda out, q: seen.append(out.shape) or original(out, q))
    attention.select(choice)
    try:
        with FakeTensorMode(), torch.no_grad():
            q, k, v = torch.empty(3, 2, 4, 10, 36, device="cuda", dtype=torch.bfloat16).unbind()
            lengths = cumulative_lengths(torch.empty(2, device="cuda", dtype=torch.int32), 10)
            out = attention(q, k, v, None, lengths, lengths)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda") and seen == [(20, 4, 40)]
        assert lengths.shape == (5,) and lengths.device.type == "cuda"
    finally:
        attention.select("auto")


def installed(monkeypatch: pytest.MonkeyPatch, three: ModuleType | None, two: ModuleType | None) -> None:
    """flash-attn 3 and 2 as importable modules, or not."""
    modules = {flash.FLASH_ATTN[0][0]: three, flash.FLASH_ATTN[1][0]: two}

    def find(name: str) -> ModuleType:
        if modules.get(name) is None:
            raise ImportError(f"No module named {name!r}")
        return modules[name]  # type: ignore[return-value]

    monkeypatch.setattr(flash.importlib, "import_module", find)
    flash.flash_attn_interface.cache_clear()


@pytest.fixture(autouse=True)
def _look_again() -> Iterator[None]:
    yield
    getattr(flash.flash_attn_interface, "cache_clear", lambda: None)()


def test_the_later_flash_attn_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn_3(), flash_attn_2())
    assert flash.flash_attn_interface() is flash_attn_3()
    installed(monkeypatch, None, flash_attn_2())
    assert flash.flash_attn_interface() is flash_attn_2()
    installed(monkeypatch, None, ModuleType("flash_attn.flash_attn_interface"))
    with pytest.raises(RuntimeError, match=r"older than 2\.7"):
        flash.flash_attn_interface()
    installed(monkeypatch, None, None)
    with pytest.raises(ImportError, match="flash_attn"):
        flash.flash_attn_interface()


def test_a_release_that_returns_the_logsumexp_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with flash_on_cpu("flash-attn 3"):
        monkeypatch.setattr(flash, "flash_attn_interface", lambda: flash_attn_3(with_lse=True))
        check(draw(2, 6, 6, 36), [6, 3], [6, 3], 1e-12)
        assert attention(*draw(2, 6, 6, 36)).shape == (2, 3, 6, 36)


def test_a_kernel_with_wrong_results_is_broken(backend: str) -> None:
    flash.try_kernel(lambda *operands: attention(*operands[:3], None, *operands[3:]), "cpu")
    with pytest.raises(AssertionError):
        flash.try_kernel(lambda q, k, v, cu_q, cu_k: attention(q, k, v), "cpu")
    with pytest.raises(AssertionError):
        flash.try_kernel(lambda q, k, v, cu_q, cu_k: attention(q, k, v.detach(), None, cu_q, cu_k) + 0 * v, "cpu")


def test_probes_name_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, on which the kernels are tried."""
    tried = []
    monkeypatch.setattr(backends, "_need_cuda", lambda version="": torch)
    monkeypatch.setattr(flash, "try_kernel", lambda kernel, device: tried.append(device))
    monkeypatch.setattr(backends, "_installed", lambda module, distribution, remedy: f"{distribution} 9.9")
    assert backends._varlen() == f"varlen_attn of torch {torch.__version__}" and tried == ["cuda"]
    monkeypatch.setattr(flash, "flash_attn_interface", flash_attn_3)
    assert backends._flash_attn() == "flash-attn 3 (flash_attn_3 9.9)"
    monkeypatch.setattr(flash, "flash_attn_interface", flash_attn_2)
    assert backends._flash_attn() == "flash-attn 2 (flash-attn 9.9)"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(backends.Unavailable, match="has no torch.nn.attention.varlen"):
        backends._varlen()


FAULTS = {
    "the scale of padded heads": (", scale=q.shape[-1] ** -0.5)", ")"),
    "queries' lengths for keys'": ("_rows(v), cu_q, cu_k,", "_rows(v), cu_q, cu_q,"),
    "k for q": ("_rows(q), _rows(k), _rows(v)", "_rows(k), _rows(k), _rows(v)"),
    "padding of heads": ("narrow(-1, 0, width)", "narrow(-1, out.shape[-1] - width, width)"),
    "heads for tokens": ("x.transpose(1, 2).flatten(0, 1)", "x.flatten(0, 1).transpose(0, 1)"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    wrong = faulty(flash, *FAULTS[fault], tmp_path)

    def function(q: Tensor, k: Tensor, v: Tensor, _mask: None, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return wrong.by_torch(q, k, v, cu_q, cu_k)

    with flash_on_cpu("varlen"), pytest.raises((AssertionError, RuntimeError)):
        check(draw(2, 9, 9, 36), [9, 9], [5, 7], 1e-12, function)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["varlen", "flash-attn"])
@pytest.mark.parametrize("width", [36, 64, 72, 128])
def test_on_a_gpu(choice: str, width: int) -> None:
    if not backends.works(choice):
        pytest.skip(backends.backend(choice).detail)
    attention.select(choice)
    try:
        for lengths in ([9, 16, 12], [16, 16, 16], [9, 10, 9]):
            operands = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in draw(3, 16, 16, width)]
            cu = cumulative_lengths(torch.tensor(lengths, device="cuda"), 16)
            out, expected = attention(*operands, None, cu, cu), by_hand(*operands, lengths, lengths)
            given = torch.randn_like(out)
            pairs = zip(
                (out, *torch.autograd.grad(out, operands, given)),
                (expected, *torch.autograd.grad(expected, operands, given.double())),
                strict=True,
            )
            for ours, theirs in pairs:
                assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max()
    finally:
        attention.select("auto")
