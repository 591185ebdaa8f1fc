"""The Triton kernels compiled for GPUs that are not here: nothing spills, and operands are read 16 bytes at a time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_command

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "kernel_resources.json"
# Of every kernel at every width, the accesses that are narrower than 16 bytes: the statistics of a row. The backward
# pass at 5120 besides splits a row in two, whose smaller part is 4 bytes per thread: all 16 bytes wide, it would spill.
NARROW = 9
NARROW_SPLIT = 13
# Triton 3.6 makes as many wide accesses, and up to 18 more narrow ones in the backward pass of norm_modulate.
NARROW_TRITON_36 = 18
# A head of 36 half-precision channels is 72 bytes, which are read by 8; one by one they would be four times as many.
NARROW_HEADS = 60
# AdamW: what it holds of a segment, and the branch for blocks that are not whole or not aligned, element by element.
NARROW_ADAMW = 83
WIDE_ADAMW = {"bf16": 14, "fp32": 16}  # all accesses of the other branch: 8 elements of each operand per thread


def compile_kernels(tmp_path: Path, widths: str, archs: str, dtypes: str = "bf16,fp32") -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it beside a CPU torch")
    out = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [
        sys.executable,
        "benchmarks/kernel_resources.py",
        "--widths",
        widths,
        "--archs",
        archs,
        "--dtypes",
        dtypes,
        "--out",
        str(out),
    ]
    done = run_command(command, timeout=230, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {key_of(row): row for row in json.loads(out.read_text())}


def key_of(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['kernel']} {row['width']} {row['dtype']} sm_{row['arch']}"


def check(rows: dict[str, dict[str, Any]]) -> None:
    is_older = importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.6")
    older = NARROW_TRITON_36 if is_older else 0
    for key, row in rows.items():
        assert row["local"] == 0 and row["stack_bytes"] == 0, f"{key} spills"
        if row["op"] == "adamw":
            assert row["wide"] == WIDE_ADAMW[row["dtype"]] and row["narrow"] <= NARROW_ADAMW, key
            continue
        split = (row["op"], row["kernel"], row["width"]) == ("norm_modulate", "backward", 5120)
        heads = row["op"] == "qk_norm" and row["width"] in (144, 288) and row["dtype"] == "bf16"
        assert row["narrow"] <= (NARROW_SPLIT if split else NARROW_HEADS if heads else NARROW) + older, key
        # What chunks of a sample add up to is a number each.
        numbers = row["kernel"] == "add_partials" and row["op"] in ("noise", "variance_bound")
        assert row["wide"] or heads or numbers, key


def test_no_kernel_spills(tmp_path: Path) -> None:
    """At the widths where rows are narrowest and where registers are scarcest; the committed table has the others."""
    check(compile_kernels(tmp_path, "288,5120", "90", "bf16"))


def committed_table() -> dict[str, dict[str, Any]]:
    return {key_of(row): row for row in json.loads(TABLE.read_text())}


def test_no_kernel_of_the_committed_table_spills() -> None:
    check(committed_table())


@pytest.mark.slow
def test_the_committed_table_is_what_is_compiled(tmp_path: Path) -> None:
    """Registers may differ a little between versions of Triton; spills and widths of accesses may not."""
    committed = committed_table()
    rows = compile_kernels(tmp_path, "144,288,576,1152,1536,2560,5120", "80,90,100")
    assert rows.keys() == committed.keys()
    check(rows)
    for key, row in rows.items():
        assert {name: row[name] for name in ("stack_bytes", "wide", "narrow", "warps")} == {
            name: committed[key][name] for name in ("stack_bytes", "wide", "narrow", "warps")
        }, key
        assert abs(row["registers"] - committed[key]["registers"]) <= 16, key
