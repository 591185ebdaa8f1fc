"""benchmarks/kernel_launches.py: what counts as a launch, and the committed table, in docs/kernels.md too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_launches as tool
from helpers.ranks import ROOT, run_command

TABLE = ROOT / "benchmarks" / "kernel_launches.json"


def rows_of(path: Path) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert all(row.pop("step") == tool.Launches(**row).step for row in rows)
    return [tool.Launches(**row) for row in rows]


def recount(families: str, tmp_path: Path) -> list[Any]:
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it beside a CPU torch")
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the table is of torch 2.13; others take other operations")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernel_launches.py", "--families", families, "--out", str(tmp_path / "rows")]
    done = run_command(command, timeout=230, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return rows_of(tmp_path / "rows")


def test_views_allocations_and_what_the_host_does_are_no_launches() -> None:
    pytest.importorskip("triton")
    there, here = torch.empty(4, 6, device="meta"), torch.ones(4, 6)
    with tool.counting() as counter:
        (there.t().reshape(2, 12)[0] + 1).sum()  # a transpose is copied where it is reshaped
        here.add(1).sum()
        here.to("meta")
        torch.empty_like(there).view(-1).detach()
    assert counter.names == ["clone", "add", "sum"]


def test_a_fused_block_launches_less_and_noise_180_kernels_less(tmp_path: Path) -> None:
    by_torch, fused = recount("dit", tmp_path)
    assert fused.block_forward <= by_torch.block_forward - 5 and fused.block_backward <= by_torch.block_backward - 19
    assert fused.rest_forward <= by_torch.rest_forward - 180


@pytest.mark.slow
def test_every_family_is_as_the_committed_table_has_it(tmp_path: Path) -> None:
    assert recount(",".join(tool.FAMILIES), tmp_path) == rows_of(TABLE)


def test_the_documentation_shows_the_committed_table() -> None:
    """After a change: python benchmarks/kernel_launches.py --out benchmarks/kernel_launches.json, and its table."""
    assert tool.table(rows_of(TABLE)) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
