"""Where values are drawn, which ticks they get, and how far up scores are shown."""

from __future__ import annotations

import pytest

from megadit.search.report.plots import new_canvas, score_limits, value_axis
from megadit.search.wording import duration_text


def labels(axis):
    """What stands at the visible ticks of a panel on which the axis's values are drawn."""
    panel = new_canvas(4, 3).subplots()
    panel.plot([axis.at(value) for value in axis.values], [0] * len(axis.values))
    axis.draw(panel.xaxis)
    low, high = panel.get_xlim()
    ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
    assert panel.get_xscale() == ("log" if axis.kind == "log" else "linear") and not panel.get_xticks(minor=True).size
    return [label.get_text() for tick, label in ticks if low <= tick <= high]


def test_a_grid_of_powers_is_logarithmic_with_its_values_as_ticks():
    axis = value_axis("optim.lr", "grid", [2.0**-k for k in (10, 9, 8, 7)] * 2)
    assert axis.kind == "log"
    assert labels(axis) == ["2^-10", "2^-9", "2^-8", "2^-7"]


def test_no_axis_has_more_than_nine_ticks():
    assert labels(value_axis("k", "grid", list(range(1, 21)))) == ["1", "4", "7", "10", "13", "16", "19"]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("log_uniform", [0.011 + 0.3 * k for k in range(300)], ["0.01", "0.1", "1", "10", "100"]),
        ("uniform", [1 + 0.43 * k for k in range(300)], ["0", "20", "40", "60", "80", "100", "120"]),
        ("uniform", [0.1 + 0.003 * k for k in range(300)], ["0.2", "0.4", "0.6", "0.8", "1"]),
        ("uniform", [7, 7], ["7"]),
        ("grid", [1, 2, 3, 5, 3], ["1", "2", "3", "5"]),
        ("grid", [0.01, 1.0, 3.0], ["0.01", "1", "3"]),
    ],
)
def test_ranges_get_round_ticks(kind, values, expected):
    assert labels(value_axis("k", kind, values)) == expected


def test_words_and_truth_values_have_places():
    axis = value_axis("k", "choice", ["a", "b", "a", True])
    assert axis.kind == "listed" and axis.at("b") == 1.0 and axis.at(True) == 2.0
    assert labels(axis) == ["a", "b", "true"]


def test_scores_far_from_the_best_do_not_stretch_the_figure():
    low, high = score_limits([0.5, 0.55, 0.6, 0.7, 900.0], lower_is_better=True)
    assert low < 0.5 and 0.7 < high < 1.0
    low, high = score_limits([0.9, 0.8, 0.7, -50.0], lower_is_better=False)
    assert high > 0.9 and 0.0 < low < 0.7
    low, high = score_limits([0.5], lower_is_better=True)
    assert low < 0.5 < high


def test_numbers_are_written_for_people():
    assert [duration_text(s) for s in (42.0, 780.0, 18720.0)] == ["42 s", "13 min", "5.2 h"]
