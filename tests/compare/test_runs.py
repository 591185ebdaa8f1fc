"""Comparing runs: crossings, gaps and speed-ups of curves whose answers are known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.compare.curves import read_curve, smoothed
from megadit.compare.plot import plot_comparison
from megadit.compare.runs import compare, describe, split_runs
from megadit.errors import UserError


def write_run(
    folder: Path,
    loss: Callable[[int], float | None],
    steps: int = 1000,
    every: int = 10,
    batch: int = 32,
    val_every: int | None = None,
) -> Path:
    """A run directory with metrics; ``loss`` is what a step's batch has, logged as the mean of each window."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(every, steps + 1, every):
        window = [loss(s) for s in range(step - every + 1, step + 1)]
        mean = None if None in window else sum(window) / every
        row = {"step": step, "loss": mean, "grad_norm": 1.0, "samples_seen": step * batch, "loss_bins": [1, None]}
        if val_every and step % val_every == 0:
            row["val_loss"] = loss(step)
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_crossing_of_two_lines(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 2.0 - s / 1000)  # lines cross at 400, value 1.6
    b = write_run(tmp_path / "b", lambda s: 2.2 - 1.5 * s / 1000)
    gap = compare([a], [b], smooth=1).main
    (crossing,) = gap.crossings
    # A window's mean lies half a window back, so both curves are late by 4.5 steps.
    assert crossing.at == pytest.approx(404.5, abs=0.01) and crossing.value == pytest.approx(1.6, abs=1e-9)
    assert crossing.b_below_after
    assert gap.gap[-1] == pytest.approx(-0.3 + 4.5 * 0.5e-3)
    assert np.isnan(gap.se).all()
    back = compare([b], [a], smooth=1).main.crossings[0]
    assert back.at == pytest.approx(crossing.at) and not back.b_below_after


def test_speedup_beyond_the_common_steps(tmp_path):
    # The paper's kind of statement: A is trained 2.9 times as long as B and ends where B ends.
    a = write_run(tmp_path / "a", lambda s: 1 + 1 / (1 + s / 290), steps=2900)
    b = write_run(tmp_path / "b", lambda s: 1 + 1 / (1 + s / 100), steps=1100)
    result = compare([a], [b], smooth=1)
    assert result.main.at[-1] == 1100  # the gap ends with the shorter run
    reach = result.main.b_reaches_a
    assert reach.of == 2900 and reach.at == pytest.approx(1000, rel=0.01) and reach.speedup == pytest.approx(2.9, 0.01)
    assert result.main.a_reaches_b.at == pytest.approx(None)
    assert "2.89x as fast in steps" in describe(result)
    # Against itself a run is exactly as fast.
    assert compare([a], [a]).main.b_reaches_a.speedup == 1.0


def test_windows_of_different_logs_are_joined(tmp_path):
    def loss(s):
        return 3 * math.exp(-s / 50) + 1

    a = write_run(tmp_path / "a", loss, every=10)
    b = write_run(tmp_path / "b", loss, every=25)
    gap = compare([a], [b], smooth=1).main
    assert list(gap.at[:3]) == [50, 100, 150]
    # The same curve: joined windows agree to rounding; taken as they are they would differ by .1 at step 50.
    assert np.abs(gap.gap).max() < 1e-12
    assert abs(read_curve(a).values[4] - read_curve(b).values[1]) > 0.1


def test_different_batches_are_told_over_samples_too(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 2 - s * 32 / 32000, batch=32)
    b = write_run(tmp_path / "b", lambda s: 2 - s * 64 / 32000, steps=510, batch=64)
    result = compare([a], [b], smooth=1)
    assert not result.same_batch and list(result.over) == ["steps", "samples"]
    assert result.over["steps"].b_reaches_a.speedup == pytest.approx(2, rel=0.02)
    # Per sample the two learn alike but for half a step of B's larger steps.
    assert np.abs(result.over["samples"].gap).max() < 0.51e-3
    assert result.over["samples"].b_reaches_a.speedup == pytest.approx(1, abs=0.01)
    assert "samples" in describe(result)


def test_seeds_give_mean_and_band(tmp_path):
    a = [write_run(tmp_path / f"a{i}", lambda s, d=d: 2 - s / 1000 + d) for i, d in enumerate((-0.1, 0.1))]
    b = [write_run(tmp_path / f"b{i}", lambda s, d=d: 2.3 - s / 1000 + d) for i, d in enumerate((-0.1, 0, 0.1))]
    gap = compare(a, b).main
    assert gap.gap == pytest.approx(np.full(100, 0.3))
    assert gap.a.sd == pytest.approx(np.full(100, 0.1 * math.sqrt(2)))
    assert gap.se == pytest.approx(np.full(100, math.sqrt(0.02 / 2 + 0.01 / 3)))
    assert gap.b_reaches_a.at is None
    assert "B never reaches A's final loss" in describe(compare(a, b))


def test_smoothing_leaves_the_one_true_crossing(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.05, 2001)
    a = write_run(tmp_path / "a", lambda s: 2 - s / 1000, every=1)
    b = write_run(tmp_path / "b", lambda s: 2.2 - 1.5 * s / 1000 + noise[s], every=1)
    assert len(compare([a], [b], smooth=1).main.crossings) > 10
    (crossing,) = compare([a], [b], smooth=201).main.crossings
    assert crossing.at == pytest.approx(400, abs=20)


def test_validation_points_are_not_windows(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 2 - s / 1000, val_every=100)
    b = write_run(tmp_path / "b", lambda s: 2.2 - 1.5 * s / 1000, val_every=200)
    gap = compare([a], [b], "val_loss").main
    assert list(gap.at) == [200, 400, 600, 800, 1000]
    assert gap.gap == pytest.approx([0.1, 0, -0.1, -0.2, -0.3])
    (crossing,) = gap.crossings  # exactly 0 at step 400
    assert crossing.at == pytest.approx(400) and crossing.value == pytest.approx(1.6)


def test_a_diverged_run_has_no_gap_from_there(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 2 - s / 1000)
    b = write_run(tmp_path / "b", lambda s: None if s > 500 else 3.0)
    result = compare([a], [b], smooth=1)
    assert np.isfinite(result.main.gap[:50]).all() and np.isnan(result.main.gap[50:]).all()
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["over"]["steps"]["final"]["gap"] is None
    assert "not finite" in describe(result)
    plot_comparison(result, tmp_path / "x.png")


def test_a_line_of_metrics_ends_at_a_line_feed_alone(tmp_path):
    run = write_run(tmp_path / "a", lambda s: 1.0, steps=20)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    more = [line.replace("{", '{"note": "a\u2028b\u0085c", ', 1) for line in lines]
    (run / "metrics.jsonl").write_bytes("\r\n".join([*more, ""]).encode("utf-8-sig"))
    assert read_curve(run).values.tolist() == [1.0, 1.0]
    (run / "metrics.jsonl").write_text("[" * 100_000 + "\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 1 of .* is not a row of metrics"):
        read_curve(run)


def test_runs_of_any_name_are_plotted(tmp_path):
    runs = [write_run(tmp_path / name, lambda s: 1.0, steps=20) for name in ("caf\udce9", r"$\frac$")]
    result = compare([runs[0]], [runs[1]])
    plot_comparison(result, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 100


def test_a_run_that_stopped_short_is_named(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 1.0)
    b = write_run(tmp_path / "b", lambda s: 2.0, steps=500)
    (a / "exit.json").write_text(json.dumps({"code": 0, "reason": "complete", "step": 1000}))
    (b / "exit.json").write_text(
        json.dumps({"code": 1, "reason": "diverged: the loss at step 510 is nan", "step": 510})
    )
    result = compare([a], [b])
    assert "note: b did not complete: diverged: the loss at step 510 is nan" in describe(result)
    assert result.to_json()["stopped"] == {"b": "diverged: the loss at step 510 is nan"}


def test_smoothed_window():
    values = np.array([1.0, 2.0, 6.0, np.nan, 8.0, 4.0, 0.0])
    assert smoothed(values, 1) == pytest.approx(values, nan_ok=True)
    expected = [1.5, 3.0, np.nan, np.nan, np.nan, 4.0, 2.0]
    assert smoothed(values, 3) == pytest.approx(expected, nan_ok=True)


def test_torn_last_line_is_dropped_and_a_broken_one_is_told(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 1.0, steps=30)
    file = a / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text + '{"step": 40, "lo')
    assert list(read_curve(a).steps) == [10, 20, 30]
    file.write_text("nonsense\n" + text)
    with pytest.raises(UserError, match=r"line 1 of .*metrics.jsonl is not a row"):
        read_curve(a)


def test_bad_input_is_told(tmp_path):
    a = write_run(tmp_path / "study" / "trials" / "0000", lambda s: 1.0, steps=30, val_every=30)
    b = write_run(tmp_path / "b", lambda s: 1.0, steps=32, every=16)
    with pytest.raises(UserError, match="no folder"):
        compare([tmp_path / "none"], [b])
    with pytest.raises(UserError, match="holds no metrics.jsonl, but trials; name one of them"):
        compare([tmp_path / "study"], [b])
    with pytest.raises(UserError, match="--key val_los: .*did you mean val_loss"):
        compare([a], [b], "val_los")
    with pytest.raises(UserError, match="it has grad_norm, loss, val_loss"):
        read_curve(a, "zebra")
    with pytest.raises(UserError, match="no step has loss in all runs .*from step 16 to 32.*from step 15 to 45"):
        write_run(tmp_path / "c", lambda s: 1.0, steps=45, every=15, batch=1)
        compare([tmp_path / "b"], [tmp_path / "c"])
    with pytest.raises(UserError, match="--smooth: 0"):
        compare([a], [a], smooth=0)
    with pytest.raises(UserError, match="names no run"):
        compare([], [a])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no row"):
        read_curve(empty)


def test_runs_are_split_and_named(tmp_path):
    odd = write_run(tmp_path / "lr=1,wd=0", lambda s: 1.0, steps=30)
    assert split_runs(str(odd)) == [odd]
    assert split_runs("runs/a, runs/b,") == [Path("runs/a"), Path("runs/b")]
    with pytest.raises(UserError, match=f"^'{odd}' is a folder with a comma in its name.*give a link"):
        split_runs(f"runs/a,{odd}, runs/b")
    trial = write_run(tmp_path / "dit-width" / "trials" / "0007", lambda s: 1.0, steps=30)
    assert read_curve(trial).name == "dit-width 0007"


def test_the_picture_shows_two_panels_per_axis(tmp_path):
    a = write_run(tmp_path / "a", lambda s: 2 - s / 1000)
    b = write_run(tmp_path / "b", lambda s: 2.2 - 1.5 * s / 1000, batch=64)
    plot_comparison(compare([a], [a]), tmp_path / "one.png")
    plot_comparison(compare([a], [b]), tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.height == two.height and two.width == 2 * one.width
