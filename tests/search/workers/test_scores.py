"""Scores from metric rows: windows weighed by their steps, what was not measured, and commands."""

from __future__ import annotations

import math
import sys

import pytest

from megadit.errors import UserError
from megadit.search.study.spec import ScoreSpec
from megadit.search.workers import scores

# Losses of steps 1 to 10 are 10, 9, ... 1; the rows hold their means over windows of 1, 3, 4 and 2 steps.
ROWS = [
    {"step": 1, "loss": 10.0},
    {"step": 4, "loss": 8.0},
    {"step": 8, "loss": 4.5, "val_loss": 7.0},
    {"step": 10, "loss": 1.5, "val_loss": math.nan},
]


@pytest.mark.parametrize(
    ("at", "last", "expected"),
    [
        (10, 2, 1.5),
        (10, 6, (4 * 4.5 + 2 * 1.5) / 6),
        (10, 10, 5.5),
        (10, 1000, 5.5),
        (10, 4, (2 * 4.5 + 2 * 1.5) / 4),  # half of a window counts for its steps inside
        (8, 4, 4.5),
        (4, 4, (10 + 3 * 8) / 4),
        (1, 1, 10.0),
        (9, 1, None),  # not logged
        (12, 1, None),  # not reached
    ],
)
def test_training_loss_weighs_windows_by_their_steps(at, last, expected):
    assert scores.train_loss(ROWS, at, last) == (expected if expected is None else pytest.approx(expected))


def test_a_loss_that_is_not_finite_is_none():
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    assert scores.train_loss(rows, 3, 1) == 1.0
    assert scores.train_loss(rows, 3, 2) is None
    assert scores.train_loss([], 3, 2) is None


def test_validation_loss_is_that_of_the_step():
    assert scores.val_loss(ROWS, 8) == 7.0
    assert scores.val_loss(ROWS, 4) is None and scores.val_loss(ROWS, 10) is None and scores.val_loss(ROWS, 11) is None


def test_divergence():
    assert scores.divergence(ROWS, 10, 1.0, 2) is None
    assert scores.divergence(ROWS, 10, None, 2) is None
    assert "more than 0.5 times the first, 10" in scores.divergence(ROWS, 10, 0.5, 10)
    assert scores.divergence(ROWS, 10, None, 10) is None
    assert "no finite training loss at step 12" in scores.divergence(ROWS, 12, None)
    assert "no finite" in scores.divergence([], 12, 1.0)


def test_measured_leaves_commands_open():
    specs = [
        ScoreSpec(name="a", kind="train_loss", last=2),
        ScoreSpec(name="b", kind="val_loss"),
        ScoreSpec(name="c", kind="command", command=("x",), key="y"),
    ]
    assert scores.metric_scores(ROWS, 8, specs) == {"a": 4.5, "b": 7.0, "c": None}


def command(program: str) -> ScoreSpec:
    return ScoreSpec(name="fid", kind="command", command=(sys.executable, "-c", program, "{run_dir}"), key="fid")


def test_a_command_prints_the_score(tmp_path):
    program = "import sys, json; print('a log line'); print(json.dumps({'fid': len(sys.argv[1]), 'other': 'x'}))"
    assert scores.command_score(command(program), tmp_path) == len(str(tmp_path))
    assert scores.command_score(command("print('{\"fid\": NaN}')"), tmp_path) is None


def test_a_command_is_no_rank_of_the_workers_group(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert scores.command_score(command("import os; print({True: '{\"fid\": 1}'}['RANK' not in os.environ])"), tmp_path)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("import sys; sys.exit('it broke')", "exit code 1: it broke"),
        ("print('no json')", "no JSON object with a number 'fid'"),
        ('print(\'{"fid": "7"}\')', "no JSON object with a number 'fid'"),
        ("import time; time.sleep(60)", "longer than 0.3 s"),
    ],
)
def test_a_command_that_fails_says_how(tmp_path, program, complaint):
    with pytest.raises(UserError, match=complaint):
        scores.command_score(command(program), tmp_path, timeout_s=0.3 if "sleep" in program else 30)


def test_a_command_that_is_not_there_is_named(tmp_path):
    spec = ScoreSpec(name="fid", kind="command", command=("/no/such/program",), key="fid")
    with pytest.raises(UserError, match="scores.fid: '/no/such/program' cannot be started"):
        scores.command_score(spec, tmp_path)


def test_the_weight_of_repa_does_not_enter_a_score():
    rows = [
        {"step": step, "loss": 1.5 - 0.5 * weight, "loss_mse": 1.0, "loss_vb": 0.5, "loss_repa": -0.5 * weight}
        for step, weight in enumerate((0.1, 0.9), start=1)
    ]
    assert [scores.train_loss(rows, at) for at in (1, 2)] == [1.5, 1.5]
    assert scores.divergence(rows, 2, 1.01) is None
    rows[1]["loss"] = rows[1]["loss_mse"] = float("nan")
    assert scores.train_loss(rows, 2) is None
