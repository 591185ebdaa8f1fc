"""The three commands of the parametrization, as commands: output, files and exit codes."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadit.config import ModelConfig, OptimConfig, load_config
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup.table import by_role, rows

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = "configs/quickstart/digits.yaml"
_SMALL = ["model.depth=1", "model.base_width=32"]


def _run(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{tool}.py", *args]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False)


def _main(tool: str, *args: str) -> int:
    """The tool's main, without the seconds that a process of its own takes to import torch."""
    module = importlib.import_module(f"megadit.cli.{tool}")
    code: int = module.main(args)
    return code


def test_mup_table_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--config", _CONFIG, "optim.lr=0.25", *_SMALL)
    plain = _run("mup_table", "--json", *args)
    assert plain.returncode == 0 and _main("mup_table", *args) == 0
    config = load_config(_ROOT / _CONFIG, ["optim.lr=0.25", *_SMALL])
    expected = rows(build_model(config.model, device="meta"), config.optim)
    assert json.loads(plain.stdout) == {"parameters": expected}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(expected[0])
    assert len(lines) == len(expected) + 2
    qkv = next(line.split() for line in lines if line.startswith("blocks.0.attn.qkv.weight"))
    assert qkv == ["blocks.0.attn.qkv.weight", "hidden", "192x64", "0.125", "1", "0.125", "0.5", "0", "1e-08", "1"]


def test_the_table_by_role_counts_blocks_that_are_alike() -> None:
    """Every parameter is in one row; a row of another shape or another number stays one of its own."""
    values = {"family": "mmdit", "width": 64, "head_dim": 16, "depth": 3, "num_classes": 0, "text": {"dim": 8}}
    config = ModelConfig.model_validate({**values, "parametrization": "mup", "base_width": 32})
    table = rows(build_model(config, device="meta"), OptimConfig())
    merged = {row["name"]: row for row in by_role(table)}
    assert [row["role"] for row in merged.values()] == sorted(
        (row["role"] for row in merged.values()), key=["input", "hidden", "vector", "output", "finite"].index
    )
    block = "joint_blocks.*.context_block"
    assert f"{block}.attn.qkv.weight ×3" in merged and f"{block}.mlp.fc1.weight ×2" in merged
    assert merged[f"{block}.adaLN_modulation.1.weight ×2"]["shape"] == [384, 64]
    assert merged["joint_blocks.2.context_block.adaLN_modulation.1.weight"]["shape"] == [128, 64]
    assert {"t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias"} <= set(merged)  # alike, but of no block
    assert sum(int(name.partition(" ×")[2] or 1) for name in merged) == len(table)
    changed = [{**row, "lr": 2 * row["lr"]} if row["name"].startswith("joint_blocks.1.x_block.attn.qkv") else row
               for row in table]  # fmt: skip
    names = {row["name"] for row in by_role(changed)}
    assert {"joint_blocks.*.x_block.attn.qkv.weight ×2", "joint_blocks.1.x_block.attn.qkv.weight"} <= names


def test_the_table_in_full_has_a_row_per_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--config", _CONFIG, "model.depth=2")
    assert _main("mup_table", "--full", *args) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    config = load_config(_ROOT / _CONFIG, ["model.depth=2"])
    assert names == [row["name"] for row in rows(build_model(config.model, device="meta"), config.optim)]
    assert _main("mup_table", *args) == 0
    assert "blocks.*.attn.qkv.weight ×2" in capsys.readouterr().out


def test_base_shapes_file_is_read_by_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mup_shape = pytest.importorskip("mup.shape")
    path = tmp_path / "digits.bsh"
    args = ("base_shapes", "--json", "--config", _CONFIG, *_SMALL, "--out")
    assert _main(*args, str(path)) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "base_width": 32, "parameters": 21}
    shapes = mup_shape.load_base_shapes(str(path))
    assert shapes["final_layer.linear.weight"].base_shape() == [None, 32]
    with pytest.raises(UserError, match="--out"):
        _main(*args, str(tmp_path / "none" / "x.bsh"))


_CHECK = ["--config", _CONFIG, "--widths", "32,64,128", "--seeds", "1", "--steps", "5", "--batch", "8"]


def test_coord_check_passes_mup_and_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cc"
    assert _main("coord_check", *_CHECK, "--lr", "2^-10", "--json", "--out", str(out), *_SMALL) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"written to {out}: coords.csv, verdict.json, coord_check.png"
    verdict = json.loads(captured.out)
    assert verdict["verdict"] == "passes" and verdict["broken"] == []
    assert verdict == json.loads((out / "verdict.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["coord_check.png", "coords.csv", "verdict.json"]
    assert (out / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "coords.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["width"] for row in table} == {"32", "64", "128"} and {row["step"] for row in table} == set("012345")
    assert {row["module"] for row in table} == {module["module"] for module in verdict["modules"]}


def test_coord_check_fails_sp_with_exit_code_3_and_names_modules(tmp_path: Path) -> None:
    done = _run("coord_check", *_CHECK, "--param", "sp", "--out", str(tmp_path / "cc"), *_SMALL)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verdict: broken"
    assert any(line.startswith("blocks.0.attn.qkv is broken: weight learns too fast") for line in lines)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--widths", "64,x"], "--widths 64,x"),
        (["--widths", "64,128"], "three different widths"),
        (["--lr", "0"], "--lr 0: not a learning rate"),
        (["--lr", "2^x"], r"--lr 2\^x: not a learning rate"),
        (["--widths", "64,72,128"], "multiples of 16"),
        (["--widths", "64,128,256", "model.dpth=1"], r"model\.depth"),
        (["--out", "/proc/none/cc"], "--out /proc/none/cc"),
    ],
)
def test_coord_check_refuses_bad_input(args: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        _main("coord_check", "--config", _CONFIG, "--out", str(tmp_path / "cc"), *args)


@pytest.mark.parametrize("tool", ["mup_table", "base_shapes", "coord_check"])
def test_help_does_not_wait_for_torch(tool: str) -> None:
    start = time.perf_counter()
    assert _run(tool, "--help").returncode == 0
    assert time.perf_counter() - start < 2.0
