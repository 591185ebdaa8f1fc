"""The coordinate check of models whose layers two ranks share reads what it reads of whole ones, in every family."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layouts.tensor_shards import this_rank
from helpers.models.tiny_dit import tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mup_mmdit
from helpers.models.tiny_pixart import tiny_mup_pixart
from helpers.models.tiny_uvit import tiny_mup_uvit
from helpers.ranks import ROOT, run_command, run_ranks
from megadit.cli import coord_check
from megadit.config import ModelConfig, ObjectiveConfig, OptimConfig
from megadit.diffusion import build_objective
from megadit.diffusion.objectives.repa import alignment_loss
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup.coord_check.measure import measure_coordinates
from megadit.mup.coord_check.plan import CoordPlan, check_shares
from megadit.mup.coord_check.record import CoordMeasurement
from megadit.mup.coord_check.verdict import judge
from megadit.mup.example import example_conditioning

REPA = {"block": 1, "feature_dim": 24, "hidden": 64}
PLAN = CoordPlan((32, 64, 96), steps=5, seeds=1, batch=4)
TEXT = {"dim": 20, "max_length": 6}  # of 7 all example texts would have one token, and queries no gradient
FAMILIES: dict[str, ModelConfig] = {
    "dit": tiny_mup_dit(64, 32, repa=REPA, qk_norm="rms"),
    "pixart": tiny_mup_pixart(64, repa=REPA, qk_norm="rms", qkv_bias=False, text=TEXT),
    "uvit": tiny_mup_uvit(64, kind="text", depth=2, repa=REPA, qk_norm="rms", mlp_time_embed=True),
    "mmdit": tiny_mup_mmdit(64, depth=2, pooled=12, repa=REPA, qk_norm="rms", mlp="swiglu"),
}


def measurements(shared: bool) -> dict[str, list[CoordMeasurement]]:
    torch.set_num_threads(1)
    layout = this_rank() if shared else None
    by_family = {}
    for name, model in FAMILIES.items():
        null = example_conditioning(model, [0])
        kind = "ddpm" if model.learn_sigma else "flow"
        by_family[name] = measure_coordinates(
            model,
            OptimConfig(lr=2.0**-9),
            PLAN,
            build=lambda config, seed: build_model(config, layout, seed),
            objective=build_objective(ObjectiveConfig(kind=kind), learn_sigma=model.learn_sigma, null=null),
            alignment=alignment_loss,
        )
    return by_family


@pytest.mark.distributed
def test_two_ranks_read_what_one_reads() -> None:
    [on_one_rank] = run_ranks(1, measurements, False)
    for shared in run_ranks(2, measurements, True):
        for name, expected in on_one_rank.items():
            assert len(shared[name]) == len(expected)
            for one, other in zip(shared[name], expected, strict=True):
                key = (other.width, other.step, other.module, other.quantity)
                assert key == (one.width, one.step, one.module, one.quantity)
                assert one.value == pytest.approx(other.value, rel=1e-6, abs=1e-12), (name, *key)
            verdicts = [judge(recorded).modules for recorded in (shared[name], expected)]
            assert [row.verdict for row in verdicts[0]] == [row.verdict for row in verdicts[1]]


def test_ranks_divide_the_heads_of_every_width() -> None:
    check_shares(FAMILIES["dit"], PLAN, 2)
    with pytest.raises(UserError, match=r"--tp 4: does not divide the 2 heads of width 32"):
        check_shares(FAMILIES["dit"], PLAN, 4)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_gives_one_verdict_for_any_number_of_ranks(tmp_path: Path) -> None:
    reports: list[Any] = []
    for ranks in ("1", "2"):
        out = tmp_path / ranks
        command = [sys.executable, str(ROOT / "tools" / "coord_check.py"), "--tp", ranks, "--out", str(out)]
        command += ["--config", "configs/quickstart/digits.yaml", "--widths", "32,64,96", "--json", "--seeds", "1"]
        command += ["model.depth=2", "model.head_dim=16", "model.heads=null", "model.qk_norm=rms"]
        done = run_command(command, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(json.loads(done.stdout))
        assert (out / "verdict.json").is_file() and (out / "coords.csv").is_file()
    assert reports[0].keys() == reports[1].keys() and reports[0]["verdict"] == reports[1]["verdict"] == "passes"
    one, two = ({row["module"]: row["verdict"] for row in report["modules"]} for report in reports)
    assert one == two


def test_a_launcher_of_other_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = ["model.head_dim=16", "model.heads=null", "--widths", "32,64,96", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="--tp 2: 3 processes were started"):
        coord_check.main(["--tp", "2", *options])
