"""tools/compare_runs.py as a command: files, output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadit.cli import compare_runs
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def main():
    return compare_runs.main


def run(folder: Path, start: float, slope: float) -> str:
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": start - slope * s, "samples_seen": 8 * s} for s in range(10, 410, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_writes_picture_and_json_and_prints_either(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slow, fast = run(tmp_path / "slow", 2.0, 1e-3), run(tmp_path / "fast", 2.1, 2e-3)
    seeds = f"{fast},{run(tmp_path / 'fast-1', 2.1, 2e-3)}"
    assert main([slow, seeds, "--json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    out = Path("runs/compare/slow-against-fast")
    assert captured.err == f"written to {out}\n"
    assert json.loads((out / "compare.json").read_text()) == printed
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    steps = printed["over"]["steps"]
    assert [round(crossing["at"]) for crossing in steps["crossings"]] == [100]
    assert steps["b_reaches_a"]["speedup"] > 1.5 and printed["b"] == ["fast", "fast-1"]
    assert main([slow, fast, "--smooth", "1", "--out", str(tmp_path / "else")]) == 0
    text = capsys.readouterr().out
    assert "crossing: B falls below A at step 100" in text and (tmp_path / "else" / "compare.png").is_file()
    assert text.endswith(f"written to {tmp_path / 'else'}\n")
    assert main([slow, seeds, "--out", str(tmp_path / "else")]) == 0  # over its own files


def test_bad_input_is_one_sentence(main, tmp_path):
    a = run(tmp_path / "a", 2.0, 1e-3)
    with pytest.raises(UserError, match="no folder nowhere"):
        main([a, "nowhere"])
    with pytest.raises(UserError, match="--out .*choose another folder"):
        main([a, a, "--out", f"{a}/metrics.jsonl"])
