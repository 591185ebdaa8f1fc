"""Partial sums are added over chunks in a fixed order, for one group or several, and rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.kernels.interpreter import Arena, faulty, need_interpreter


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    need_interpreter()


def added(partial: Tensor, sums: Tensor) -> Tensor:
    from megadit_kernels import partial_sums

    partial_sums.add_up(partial, sums)
    return sums


@pytest.mark.parametrize("shape", [(1, 3), (16, 128), (40, 300), (3, 1, 130), (2, 35, 257)])
def test_sums_of_each_group(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    arena = Arena()
    partial = arena.operand(torch.randn(shape))
    sums = added(partial, arena.output((*shape[:-2], shape[-1]), torch.float32))
    arena.check()
    torch.testing.assert_close(sums.double(), partial.double().sum(-2), rtol=1e-6, atol=1e-5)
    rounded = added(partial, arena.output(tuple(sums.shape), torch.bfloat16))
    assert torch.equal(rounded, sums.bfloat16())


def test_chunks_of_a_sample_depend_on_its_size_alone() -> None:
    from megadit_kernels.partial_sums import chunks_of

    assert chunks_of(1, 1024) == (1024, 1) and chunks_of(4096, 2048) == (4096, 1)
    assert chunks_of(16384, 1024) == (16384, 1) and chunks_of(16385, 1024) == (16384, 2)


FAULTS = {
    "the last chunk": ("range(0, chunks, ROWS)", "range(0, chunks - 1, ROWS)"),
    "the group of a partial sum": ("partial + (group * chunks + row)", "partial + (row)"),
    "the group of a sum": ("sums + group * SIZE", "sums"),
    "the chunks beyond the first rows": ("total += tl.load", "total = tl.load"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels import partial_sums

    wrong = faulty(partial_sums, *FAULTS[fault], tmp_path)
    monkeypatch.setattr(partial_sums, "add_up", wrong.add_up)
    with pytest.raises(AssertionError):
        for shape in ((2, 33, 130), (2, 17, 5)):
            test_sums_of_each_group(shape)
