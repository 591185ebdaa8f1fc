"""The GPU benchmarks run every line on the CPU and mark their numbers as none; docs/gpu.md claims nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adamw, blocks, gpu, kernels, mup_overhead
from benchmarks.gpu_page import AIMS, page
from benchmarks.gpu_timing import Arm, Deadline, Stopwatch
from benchmarks.kernel_cases import CASES, fused_ops
from helpers.kernels.interpreter import need_interpreter
from helpers.ranks import ROOT, run_command
from megadit.errors import UserError
from megadit_kernels import select_all

FUSED = list(fused_ops())
KERNEL_ROW = {"op", "width", "samples", "tokens", "pass", "bytes", "us", "gb_s", "share_of_copy"}
BLOCK_ROW = {"part", "arm", "images", "forward_flops_per_image", "ms", "images_s", "tflop_s", "mfu", "peak_gb"}


@pytest.fixture(autouse=True)
def _selected_again() -> Iterator[None]:
    need_interpreter()
    yield
    select_all("auto")


def dry_run(module: Any, out: Path, *options: str) -> dict[str, Any]:
    assert module.main(["--dry_run", "--out", str(out), *options]) == 0
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert document["note"] == "dry run, not a measurement" and document["dry_run"] and document["skipped"] == []
    assert set(document["machine"]) == {"gpu", "python", "torch", "cuda", "triton", "date"}
    return document


@pytest.mark.parametrize("name", FUSED)
def test_an_operation_is_measured_in_each_direction(name: str, tmp_path: Path, capsys: Any) -> None:
    document = dry_run(kernels, tmp_path / "out.json", "--ops", name)
    directions = ["forward", "backward"] if CASES[name].has_backward else ["forward"]
    assert [(row["op"], row["pass"]) for row in document["rows"]] == [(name, direction) for direction in directions]
    for row in document["rows"]:
        assert KERNEL_ROW | {"eager_over_fused", "compiled_over_fused"} == set(row)
        assert row["us"].keys() == {"fused", "eager", "compiled"} and min(row["us"].values()) > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"]["fused"] / 1e3)
    assert {"copy_gb_s", "bf16_tflop_s", "tf32_tflop_s", "fp8_tflop_s"} == set(document["ceilings"])
    assert "dry run, not a measurement" in capsys.readouterr().out


def test_bytes_are_those_of_operands_and_results() -> None:
    """Of a gated residual, in rows of a token: x, branch in and x' out; then dx', branch in and dx, dbranch out."""
    import torch

    from benchmarks.kernel_cases import CASES, Draw, Shape

    case, shape = CASES["gated_residual"], Shape(2, 64, 16)
    leaves = case.leaves(shape, Draw(torch.bfloat16, "cpu").tensors())
    results = case.results(lambda x, gate, branch: x, leaves)
    row, vector = 2 * 64 * 16 * 2, 2 * 16 * 2
    assert case.forward_bytes(leaves, results) == 3 * row + vector
    assert case.backward_bytes(leaves, results) == 4 * row + 2 * vector


def test_a_block_and_a_step_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    document = dry_run(blocks, tmp_path / "out.json", "--parts", "dit_step")
    assert [row["arm"] for row in document["rows"]] == [
        "fused", "fused compiled", "torch", "diffusers", "diffusers compiled", "official way, fp32 and TF32"
    ]  # fmt: skip
    for row in document["rows"]:
        assert BLOCK_ROW | {"of_measured_peak"} == set(row) and row["mfu"] is None
        flops = 3 * row["forward_flops_per_image"] * row["images"] / row["ms"] * 1000
        assert row["tflop_s"] == pytest.approx(flops / 1e12)
    assert document["formula"].startswith("MFU = 3 F images / (seconds P)")


@pytest.mark.slow
def test_every_part_is_measured(tmp_path: Path) -> None:
    document = dry_run(blocks, tmp_path / "out.json")
    assert {row["part"] for row in document["rows"]} == set(blocks.PARTS)
    arms = {row["arm"] for row in document["rows"] if row["part"] == "mmdit_block"}
    assert arms == {name + suffix for name in ("fused", "torch", "fp8") for suffix in ("", " compiled")}


def test_mup_and_sp_have_the_same_shapes(tmp_path: Path) -> None:
    document = dry_run(mup_overhead, tmp_path / "out.json")
    assert document["parameters"]["muP"] == document["parameters"]["SP"]
    assert document["mup_over_sp"] == pytest.approx(document["ms"]["muP"] / document["ms"]["SP"])


def test_the_fused_update_is_measured_against_torchs_passes(tmp_path: Path) -> None:
    document = dry_run(adamw, tmp_path / "out.json")
    ms = document["ms"]
    assert ms.keys() == {"fused", "torch", "update", "copy"}
    assert document["fused_gb_s"] == pytest.approx(28 * document["parameters"] / ms["fused"] / 1e6)
    assert document["torch_over_fused"] == pytest.approx(ms["torch"] / ms["fused"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_in_one_file_and_one_page(tmp_path: Path) -> None:
    results, shown = tmp_path / "results.json", tmp_path / "page.md"
    command = [sys.executable, "benchmarks/gpu.py", "--dry_run", "--results", str(results), "--page", str(shown)]
    done = run_command(command, timeout=800, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text(encoding="utf-8"))
    assert document["tests"]["counts"]["collected"] > 100
    assert shown.read_text(encoding="utf-8") == page(document)
    assert "**dry run, not a measurement**" in page(document) and "| reached |" not in page(document)


def test_the_committed_page_is_that_of_the_results_there_are() -> None:
    """Without benchmarks/gpu_results.json it says that nothing was measured, and how to."""
    stored = ROOT / gpu.RESULTS
    results = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else None
    assert (ROOT / "docs/gpu.md").read_text(encoding="utf-8") == page(results)
    assert results is None or not results["dry_run"]
    assert "**Not yet measured on a GPU.** The command is ready: `make gpu`" in page(None)


def made_up() -> dict[str, Any]:
    """Results in which every aim is just reached."""
    row = {"width": 288, "us": {"fused": 1.0}, "gb_s": 1.0, "eager_over_fused": 1.0, "compiled_over_fused": 1.0}
    rates = {"diffusers": 10.0, "diffusers compiled": 13.0, "official way, fp32 and TF32": 6.5, "fused": 13.0}
    numbers = {"ms": 1.0, "tflop_s": 1.0, "mfu": 0.6, "of_measured_peak": 0.7, "peak_gb": 1.0, "images": 1}
    rows = [{"part": "dit_step", "arm": arm, "images_s": rate} | numbers for arm, rate in rates.items()]
    rows += [{"part": "mmdit_block", "arm": arm, "images_s": s} | numbers for arm, s in (("fused", 4.0), ("fp8", 5.0))]
    machine = {"gpu": "NVIDIA H200", "python": "3.12", "torch": "2.11", "triton": "3.6", "date": "2026-12-01"}
    return {
        "dry_run": False, "note": None, "seconds": 500, "machine": machine, "ceilings": {"copy_gb_s": 4300.0},
        "tests": {"counts": {"passed": 3}},
        "kernels": {"rows": [row | {"op": "o", "pass": "forward", "share_of_copy": 0.85},
                             row | {"op": "o", "pass": "backward", "share_of_copy": 0.75}]},
        "blocks": {"formula": "F", "rows": rows},
        "mup_overhead": {"ms": {"muP": 1.0}, "groups": {"muP": 5}, "mup_over_sp": 1.005,
                         "skipped": [{"what": "it", "needs": "that"}]},
        "adamw": {"ms": {"fused": 1.0}, "parameters": 1000, "gradients": 3, "fused_gb_s": 28.0, "copy_gb_s": 30.0},
    }  # fmt: skip


def test_an_aim_is_reached_or_not() -> None:
    results = made_up()
    assert page(results).count("| reached |") == len(AIMS) and "| it | that |" in page(results)
    assert "fused 28 GB/s, a copy 30" in page(results)
    results["kernels"]["rows"][0]["share_of_copy"] = 0.84
    results["mup_overhead"]["mup_over_sp"] = 1.006
    results["blocks"]["rows"].pop()
    assert page(results).count("| not reached |") == 2
    assert AIMS[-2].row(results)[-1] == "not measured"  # without the FP8 arm


def test_a_file_of_gpu_tests_is_found() -> None:
    assert "tests/kernels/test_on_gpu.py" in gpu.files_with_gpu_tests()
    assert "tests/test_structure.py" not in gpu.files_with_gpu_tests()


def test_arms_take_turns_and_a_deadline_is_told(capsys: Any) -> None:
    turns: list[str] = []
    arms = {name: Arm(lambda name=name: turns.append(name), lambda: turns.append("-")) for name in "ab"}
    assert set(Stopwatch("cpu", warmup=1, rounds=1).medians(arms)) == {"a", "b"}
    assert "".join(turns) == "-b-a-a-b"
    deadline = Deadline(0.0)
    assert not deadline.left("a case") and deadline.skipped[0]["what"] == "a case"
    assert "SKIPPED a case: time: 0 s were over" in capsys.readouterr().out


@pytest.mark.parametrize("module", [kernels, blocks, mup_overhead, adamw, gpu])
def test_without_a_gpu_it_is_one_sentence(module: Any) -> None:
    with pytest.raises(UserError, match="CUDA device.*--dry_run"):
        module.main([])
