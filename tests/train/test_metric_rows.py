"""metrics.jsonl after a crash, an edit or a bad copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.train.run_dir import RunDirectory, is_number, read_rows

SOUND = b'{"step": 1, "loss": 0.5, "samples_seen": 16}\n{"step": 2, "loss": null, "samples_seen": 32}\n'


def test_sound_rows(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_rows(file).rows == []
    file.write_bytes(b"\xef\xbb\xbf" + SOUND.replace(b"\n", b"\r\n") + b"\n")
    metrics = read_rows(file)
    assert [row["step"] for row in metrics.rows] == [1, 2] and metrics.broken == ()


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b"[" * 3000,
        b"5",
        b"{}",
        b'{"step": "2"}',
        b'{"step": -1}',
        b'{"step": true}',
        b'{"step": 2, "loss": "x"}',
        b'{"step": 2, "samples_seen": []}',
        b'{"step": 2, "val_loss": {}}',
        b'{"step": 1e400}',
        b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
    ],
)
def test_lines_that_are_no_rows(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(line + b"\n" + SOUND)
    assert (len(read_rows(file).rows), read_rows(file).broken) == (2, (1,))
    file.write_bytes(SOUND + line + b"\n")
    assert (len(read_rows(file).rows), read_rows(file).broken) == (2, ())


def test_a_resumed_run_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(b'{"step": 0}\n\0\0\0\n' + SOUND + b'{"step": 3, "lo')
    run.truncate_metrics(1)
    assert [row["step"] for row in run.read_metrics()] == [0, 1]
    assert "has 1 lines that are no rows of metrics, first line 2" in capsys.readouterr().err
    run.truncate_metrics(1)
    assert capsys.readouterr().err == ""


def test_numbers() -> None:
    assert is_number(1) and is_number(0.5) and is_number(float("nan")) and is_number(float("inf"))
    assert not (is_number(10**400) or is_number(True) or is_number("1") or is_number(None))
