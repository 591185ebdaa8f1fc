"""benchmarks/convert_memory.py: conversions take a share of the file's memory, of whatever format they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.ranks import ROOT
from helpers.scripts import import_script

STREAMED = (
    "official-pt-fp32",
    "official-pt-fp16",
    "megadit-safetensors",
    "megadit-pt",
    "plain-safetensors",
    "plain-torch",
)
COMPARED = ("megadit-diffusers", "diffusers-megadit")
# Bytes that are taken whatever the size: what models compute, modules imported late, pages of libraries that are mapped
# when they are first used.
FIXED = 160 * 2**20


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return import_script(ROOT / "benchmarks/convert_memory.py")


def test_every_case_reads_a_file_that_is_there(tool: Any) -> None:
    for name in tool.CASES:
        needed = tool._with_needs([name])
        made = {tool.CASES[each][3] for each in needed}
        source = tool.CASES[name][1]
        assert source in made or source.startswith(("float", "bfloat")) or (source == "sharded" and "pipeline" in made)


def test_a_small_conversion_is_measured(tool: Any, tmp_path: Path, capfd: Any) -> None:
    tool.write_sources(tmp_path, {"float32.safetensors"}, megabytes=3)
    tool.child("official-mmdit", str(tmp_path / "float32.safetensors"), "megadit", str(tmp_path / "run"))
    measured = json.loads(capfd.readouterr().out)
    assert measured["bytes"] >= (tmp_path / "float32.safetensors").stat().st_size and measured["seconds"] > 0
    # Of a process that has held more before, the peak says nothing: how much is asked of processes of their own.
    assert {"rss", "anon", "rss_bytes", "difference"} <= set(measured)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_conversions_stay_below_the_bound(tool: Any, tmp_path: Path) -> None:
    """1.2 of the larger file; where the model itself is built to be compared, what that takes beside is fixed."""
    pytest.importorskip("diffusers")
    measured = tool.measure(tmp_path, 400, [*STREAMED, *COMPARED])
    for name in STREAMED:
        assert measured[name]["rss_bytes"] < 0.6 * measured[name]["bytes"] + FIXED, name
        assert measured[name]["anon"] < 0.6, name
    for name in COMPARED:
        assert measured[name]["rss_bytes"] < 1.2 * measured[name]["bytes"] + FIXED, name
        assert measured[name]["difference"] < 1e-3
