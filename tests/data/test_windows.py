"""Windows of sample numbers that are left out: the others come in order, the same on every layout."""

import random

import pytest
import torch

from megadit.data import BatchLayout, BatchStream
from megadit.data.windows import (
    format_windows,
    merge_windows,
    remaining_windows,
    subtract_windows,
    windows_before,
    windows_option,
)

WINDOWS = ((3, 5), (8, 24), (40, 41))


def numbers_of(windows):
    return [number for window in windows for number in range(*window)]


def test_what_is_kept_are_the_numbers_outside_all_windows():
    draw = random.Random(0)
    for _ in range(200):
        starts = draw.choices(range(60), k=draw.randint(0, 4))
        windows = merge_windows((first, first + draw.randint(1, 9)) for first in starts)
        remaining = [number for number in range(200) if number not in numbers_of(windows)]
        start, count = draw.randint(0, 60), draw.randint(1, 40)
        assert numbers_of(remaining_windows(start, count, windows)) == remaining[start : start + count]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (2, 2), (4, 1)])
def test_every_layout_takes_the_same_numbers(ranks, micro_batch):
    layouts = [BatchLayout(8, ranks, rank, micro_batch, WINDOWS) for rank in range(ranks)]
    remaining = [number for number in range(100) if number not in numbers_of(WINDOWS)]
    for step in range(6):
        numbers = [layout.numbers(step, micro) for micro in range(layouts[0].accumulation) for layout in layouts]
        assert [number for part in numbers for number in part] == remaining[8 * step : 8 * (step + 1)]
        assert numbers_of(layouts[0].windows(step)) == remaining[8 * step : 8 * (step + 1)]


def test_each_window_is_left_behind_by_one_step():
    layout = BatchLayout(8, 1, 0, 8, WINDOWS)
    assert [layout.newly_skipped(step) for step in range(5)] == [[(3, 5), (8, 24)], [], [(40, 41)], [], []]
    assert [layout.next_number(step) for step in range(4)] == [0, 26, 34, 43]


def test_samples_that_stay_keep_their_image():
    from megadit.config import DataConfig
    from megadit.data import build_datasets

    train_set, _ = build_datasets(DataConfig(name="digits"))

    def images(layout, workers, steps):
        with BatchStream(train_set, layout, seed=3, flip=True, workers=workers) as stream:
            batches = [next(stream) for _ in range(steps)]
        return {int(n): image for batch in batches for n, image in zip(batch.numbers, batch.images, strict=True)}

    plain, left = images(BatchLayout(8, 1, 0, 8), 0, 8), images(BatchLayout(8, 1, 0, 4, WINDOWS), 1, 8)
    assert sorted(left) == [n for n in range(64) if n not in numbers_of(WINDOWS)][:32]
    assert all(torch.equal(image, plain[number]) for number, image in left.items())


def test_windows_as_sets_and_as_text():
    assert merge_windows([(5, 7), (0, 2), (2, 3), (6, 9)]) == ((0, 3), (5, 9))
    assert subtract_windows([(0, 10)], [(2, 4), (8, 12)]) == ((0, 2), (4, 8))
    assert subtract_windows([(0, 2)], [(0, 9)]) == ()
    assert windows_before([(0, 4), (6, 9)], 7) == ((0, 4), (6, 7))
    assert format_windows([(7, 8)]) == "sample 7" and format_windows([(0, 4), (8, 9)]) == "samples 0 to 3, 8"
    assert windows_option([(0, 4), (8, 9)]) == "[[0,4],[8,9]]"
