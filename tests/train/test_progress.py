"""The progress line: what a step shows, and when it tells of waiting for data."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megadit.train.callbacks.logging import ProgressBar
from megadit.train.metrics import Clock


def run_at(step: int = 0) -> Any:
    """As much of a run as the progress line reads."""
    context, position = SimpleNamespace(is_main=True), SimpleNamespace(step=step)
    return SimpleNamespace(context=context, position=position, total_steps=40)


def record(step: int, waited: float, *, seconds: float = 4.12) -> dict[str, Any]:
    """The record of a window of 10 steps, made by the clock that training uses."""
    clock = Clock(waited=waited, steps=10)
    clock.started -= seconds
    return {"step": step, "loss": 0.5, "lr": 1e-3, **clock.rates(32)}


def lines(capsys: pytest.CaptureFixture[str], *records: dict[str, Any]) -> list[str]:
    progress, run = ProgressBar(), run_at()
    progress.on_start(run)
    for entry in records:
        progress.on_log(run, entry)
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_waiting_for_data_is_shown_beyond_one_percent(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, slow, slower = lines(capsys, record(10, 0.02), record(20, 0.13), record(30, 2.06))
    assert quiet.startswith("step 10/40  loss 0.5000  lr 1.00e-03  78 img/s  ETA ")
    assert "data wait" not in quiet and " s  " not in quiet
    assert "78 img/s  data wait 3.2%  step 0.412 s  ETA " in slow
    assert "data wait 50.0%  step 0.412 s" in slower


def test_the_bar_shows_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []

    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def set_postfix_str(self, text: str) -> None:
            shown.append(text)

        def close(self) -> None: ...

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert lines(capsys, record(10, 0.02), {**record(20, 0.13), "val_loss": 0.25}) == []
    assert shown == [
        "loss 0.5000  lr 1.00e-03  78 img/s",
        "loss 0.5000  lr 1.00e-03  78 img/s  data wait 3.2%  step 0.412 s  val 0.2500",
    ]
