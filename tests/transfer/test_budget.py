"""The cost of tuning against the paper's numbers."""

from __future__ import annotations

import pytest

from megadit.errors import UserError
from megadit.transfer.budget import tuning_cost_ratio

B = 1e9
MMDIT = [(80, 0.18 * B, 30e3), (5, 0.18 * B, 100e3)]


def test_ratios_of_the_paper():
    assert tuning_cost_ratio([(5, 0.04 * B, 5)], (0.61 * B, 30)) == pytest.approx(0.0546, abs=5e-5)
    assert tuning_cost_ratio(MMDIT, (18 * B, 200e3)) == pytest.approx(0.145, abs=5e-4)
    assert tuning_cost_ratio(MMDIT, (18 * B, 200e3), manual_multiple=5) == pytest.approx(0.029, abs=5e-5)


@pytest.mark.parametrize(
    ("stages", "target", "multiple", "words"),
    [
        ([], (1, 1), None, "stages"),
        ([(1, -2, 3)], (1, 1), None, "none negative"),
        ([(1, 2, float("nan"))], (1, 1), None, "stages"),
        ([(1, 2, 3)], (0, 1), None, "target"),
        ([(1, 2, 3)], (1, 1), 0, "--manual-multiple: 0"),
    ],
)
def test_numbers_without_sense_are_refused(stages, target, multiple, words):
    with pytest.raises(UserError, match=words):
        tuning_cost_ratio(stages, target, multiple)
