"""The paper's own tables give the paper's own verdicts (arXiv 2505.15270, tables 7 to 11)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.search.verdict.table import Columns, lower_is_better, verify_table
from megadit.search.verdict.verdict import Verdict

PAPER = Path(__file__).resolve().parents[2] / "data" / "paper"
TABLES = {
    7: ("table07_width_lr.csv", "width", "log2_lr"),
    8: ("table08_batch_lr.csv", "batch_size", "log2_lr"),
    9: ("table09_steps_lr.csv", "steps", "log2_lr"),
    10: ("table10_width_output_mult.csv", "width", "log2_output_mult"),
    11: ("table11_steps_output_mult.csv", "steps", "log2_output_mult"),
}
BASE = {7: 288, 8: 256, 9: 200_000, 10: 288, 11: 200_000}  # the setting of the paper's proxy


def verdict_on(table: int, score: str = "fid50k", proxy: float | None = None) -> Verdict:
    name, scale, hp = TABLES[table]
    lower = lower_is_better(score)
    assert lower is not None
    return verify_table(PAPER / name, Columns(scale, hp, score), lower=lower, proxy=proxy)


@pytest.mark.parametrize("from_base", [False, True], ids=["from the smallest", "from the paper's base"])
@pytest.mark.parametrize(("table", "exceptions"), [(7, ()), (8, (128,)), (9, (100_000,))])
def test_the_learning_rate_transfers(table, exceptions, from_base):
    verdict = verdict_on(table, proxy=BASE[table] if from_base else None)
    assert verdict.verdict == "transfers"
    assert verdict.best == verdict.best_log2 == -10.0
    assert verdict.exceptions == exceptions
    assert verdict.regret == 0.0


@pytest.mark.parametrize("from_base", [False, True], ids=["from the smallest", "from the paper's base"])
@pytest.mark.parametrize("table", [10, 11])
def test_the_output_multiplier_transfers_in_a_broad_basin(table, from_base):
    verdict = verdict_on(table, proxy=BASE[table] if from_base else None)
    assert verdict.verdict == "transfers" and not verdict.exceptions
    assert verdict.best is not None and 0 <= verdict.best <= 4
    assert any("cannot be told from the best" in reason for reason in verdict.reasons)


def test_divergence_above_the_best_is_a_measured_edge():
    """2^-10 is the highest stable rate at every width: not the end of the grid."""
    verdict = verdict_on(7)
    for entry in verdict.scales:
        assert entry.optimum is not None
        assert entry.optimum.basin.high == "edge" and not entry.optimum.open


@pytest.mark.parametrize("score", ["sfid50k", "inception_score", "precision", "recall"])
def test_other_scores_agree_over_width(score):
    verdict = verdict_on(7, score)
    assert verdict.verdict == "transfers" and verdict.best == -10.0


def test_an_exception_is_told_with_its_cost():
    reasons = verdict_on(8).reasons
    assert reasons[0] == "transfers from batch_size 256 on; exception: batch_size 128"
    assert "1.07 (1.5 %)" in reasons[1]
