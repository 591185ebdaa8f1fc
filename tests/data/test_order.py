"""Sample order and batch layout: every split of a step over ranks and micro batches covers the same images."""

from __future__ import annotations

import pickle

import pytest
import torch

from megadit.data.order import BatchLayout, SampleOrder
from megadit.errors import UserError
from megadit.rng import permutation, stream_key


def test_every_epoch_shows_each_image_once_and_in_another_order() -> None:
    order = SampleOrder(size=23, seed=5)
    epochs = [order.indices(range(23 * e, 23 * (e + 1))) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order.epoch(s) for s in (0, 22, 23, 69)] == [0, 0, 1, 3]


def test_indices_follow_the_documented_formula_in_any_request_order() -> None:
    order = SampleOrder(size=7, seed=3)
    numbers = [20, 0, 6, 7, 34, 13, 0]  # back and forth over five epochs, one number twice
    expected = [int(permutation(stream_key(3, "order", s // 7), 7)[s % 7]) for s in numbers]
    assert order.indices(numbers) == expected
    assert order.indices(torch.tensor(numbers)) == expected


def test_order_depends_on_the_seed_alone() -> None:
    fresh, used = SampleOrder(50, 1), SampleOrder(50, 1)
    used.indices(range(500))
    assert used.indices(range(120, 140)) == fresh.indices(range(120, 140))
    assert SampleOrder(50, 2).indices(range(50)) != fresh.indices(range(50))


def test_a_pickled_order_leaves_its_permutations_behind() -> None:
    order = SampleOrder(10_000, 0)
    expected = order.indices(range(5))
    assert len(pickle.dumps(order)) < 500
    assert pickle.loads(pickle.dumps(order)).indices(range(5)) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_all_layouts_cover_the_same_numbers_in_each_step(ranks: int, micro_batch: int) -> None:
    layouts = [BatchLayout(global_batch=16, ranks=ranks, rank=r, micro_batch=micro_batch) for r in range(ranks)]
    assert layouts[0].accumulation == 16 // (ranks * micro_batch)
    for step in range(3):
        numbers = [n for layout in layouts for micro in range(layout.accumulation) for n in layout.numbers(step, micro)]
        assert sorted(numbers) == list(range(16 * step, 16 * (step + 1)))


def test_numbers_of_one_micro_batch() -> None:
    layout = BatchLayout(global_batch=24, ranks=3, rank=1, micro_batch=4)
    assert layout.numbers(2, 1) == [2 * 24 + (1 * 3 + 1) * 4 + k for k in range(4)]


def test_a_batch_larger_than_the_set_wraps_over_epochs() -> None:
    order = SampleOrder(size=5, seed=0)
    indices = order.indices(BatchLayout(global_batch=16, ranks=1, rank=0, micro_batch=16).numbers(0, 0))
    assert [sorted(indices[5 * e : 5 * e + 5]) for e in range(3)] == [list(range(5))] * 3


def test_a_batch_that_the_layout_cannot_divide_is_told() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch: 10 is not a multiple of 2 .* multiple of 8"):
        BatchLayout(global_batch=10, ranks=2, rank=0, micro_batch=4)


def test_misuse_by_code_is_not_a_user_error() -> None:
    with pytest.raises(ValueError):
        BatchLayout(global_batch=4, ranks=2, rank=2, micro_batch=1)
    with pytest.raises(ValueError):
        BatchLayout(global_batch=4, ranks=1, rank=0, micro_batch=1).numbers(0, 4)
    with pytest.raises(ValueError):
        SampleOrder(size=0, seed=0)
