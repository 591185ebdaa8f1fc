"""Layouts planned in one process: who holds what, and the 18B runs on 64, 128 and 256 GPUs by the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers.layouts.parity import config_of
from helpers.ranks import ROOT
from helpers.training import layout_of
from megadit.config import RunConfig, load_config
from megadit.errors import UserError
from megadit.models import build_model, count_parameters
from megadit.plan.describe import table
from megadit.plan.layout import LayoutPlan, plan_layout
from megadit.plan.memory import state_bytes


def planned(world: int, train: dict[str, object] | None = None, **parallel: object) -> LayoutPlan:
    config, ds_config = layout_of(config_of(train, **parallel), world)
    return plan_layout(config, world, ds_config, count_parameters(config.model, fixed=False))


def count_all(config: RunConfig) -> int:
    return sum(p.numel() for p in build_model(config.model, device="meta").parameters())


def test_every_rank_has_its_place_and_every_parameter_a_holder():
    plan = planned(8, {"micro_batch": 2}, tensor=2, pipeline=2)
    assert (plan.tensor, plan.pipeline, plan.data, plan.micro_batches) == (2, 2, 2, 4)
    assert [stage.ranks for stage in plan.stages] == [(0, 3), (4, 7)]
    assert plan.tensor_groups == ((0, 1), (4, 5))
    assert [stage.ends for stage in plan.stages] == [("embedding",), ("readout",)]
    assert [stage.blocks for stage in plan.stages] == [(1, 1), (2, 2)]
    assert [stage.in_flight for stage in plan.stages] == [2, 1]
    assert sum(stage.flops_share for stage in plan.stages) == pytest.approx(1)
    parameters = sum(stage.parameters for stage in plan.stages)
    assert plan.parameters == count_all(config_of()) and plan.parameters / 2 < parameters < plan.parameters * 0.7
    assert plan.bubble == pytest.approx(1 / 5) and plan.idle >= plan.bubble - 1e-9


def test_bytes_are_those_of_what_a_rank_holds():
    plan = planned(4, {"precision": "bf16", "micro_batch": 4}, tensor=2, zero_stage=2)
    [stage] = plan.stages
    state = state_bytes(stage.parameters, 2, 2, "bf16", 1, 4)  # two micro batches, added up in float32
    assert {key: stage.bytes[key] for key in state} == state
    assert stage.bytes["activations"] > 0 and stage.total == sum(stage.bytes.values())
    assert set(stage.sent) == {
        "tensor all_reduce", "tensor all_gather", "data all_reduce of gradients", "data all_gather of weights"
    }  # fmt: skip


def test_messages_grow_with_the_micro_batches_and_stages_that_wait_hold_more():
    two, four = (planned(2, {"micro_batch": micro}, pipeline=2) for micro in (8, 4))
    first, second = four.stages
    assert first.sent["pipeline send"] == pytest.approx(two.stages[0].sent["pipeline send"], rel=0.01)
    assert first.in_flight == 2 and second.in_flight == 1
    assert four.bubble < two.bubble
    recomputed = planned(2, {"micro_batch": 4, "activation_checkpointing": "full"}, pipeline=2)
    assert recomputed.stages[0].bytes["activations"] < first.bytes["activations"]


def test_the_table_and_its_json_say_the_same():
    plan = planned(4, tensor=2, pipeline=2, sequence=True)
    text, facts = table(plan), json.loads(json.dumps(plan.as_json()))
    assert "tensor 2 with sequence x pipeline 2 x data 1" in text
    assert (
        "replica 0 is 0-1, 2-3" in text
        and "embedding, block 1" in text
        and f"{facts['stages'][1]['parameters']:,}" in text
    )
    assert facts["bytes_per_rank"] == max(stage.total for stage in plan.stages)
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["0", "1"] and {len(row) for row in rows} == {2 + len(plan.stages[0].sent)}


PRETRAIN = ROOT / "launch" / "pretrain.py"
LAYOUTS_18B: dict[int, tuple[tuple[str, ...], int, int, float]] = {
    64: ((), 8, 4, 19e9),
    128: (("parallel.pipeline=16",), 16, 4, 13.5e9),
    256: (("parallel.tensor=4",), 8, 8, 9.5e9),
}


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("18b-mup", 64),
        *(
            pytest.param(name, world, marks=pytest.mark.slow)
            for name, world in [("18b-mup", 128), ("18b-mup", 256), ("18b-sp", 64), ("18b-sp", 128), ("18b-sp", 256)]
        ),
    ],
)
def test_18b_is_planned_in_a_minute_and_four_gigabytes(name, world, tmp_path):
    overrides, stages, replicas, most = LAYOUTS_18B[world]
    files = ["--config", f"configs/mmdit/{name}.yaml", "--ds_config", f"configs/deepspeed/mmdit-18b-{world}.json"]
    command = [sys.executable, str(PRETRAIN), *files, "--dry_run", "--json", "--world_size", str(world), *overrides]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*command, "--run_dir", str(tmp_path)], cwd=ROOT, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    stderr = (tmp_path / "err").read_text()
    assert process.returncode == 0, stderr
    assert "warning: on this machine the run would be refused: data.path" in stderr
    plan = json.loads((tmp_path / "out").read_text())
    assert plan["parameters"] == pytest.approx(18.13e9, rel=1e-3)  # with REPA's projector
    assert (plan["data"], plan["micro_batches"], len(plan["stages"])) == (replicas, 1024 // replicas, stages)
    fullest = plan["stages"][0]
    assert fullest["bytes"]["gradients"] == 4 * fullest["parameters"] == 2 * fullest["bytes"]["weights"]
    assert plan["idle"] < 0.09 and plan["bytes_per_rank"] < most
    # Seconds of the processor, which other work does not stretch; measured: 11 s and 0.45 GB.
    assert usage.ru_utime + usage.ru_stime < 60
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 4e9


def test_only_dry_runs_are_for_other_machines(capsys, tmp_path):
    from megadit.train.entry import run

    arguments = ("configs/quickstart/digits.yaml", [], None, str(tmp_path), "auto")
    with pytest.raises(UserError, match="--world_size: belongs to --dry_run"):
        run(*arguments, False, world_size=8)
    with pytest.raises(UserError, match="--world_size: 0 is no number of ranks"):
        run(*arguments, True, world_size=0)
    with pytest.raises(UserError, match="does not divide the 9 processes"):
        run(arguments[0], ["parallel.tensor=2"], *arguments[2:], True, world_size=9)
    assert run(*arguments, True, world_size=8, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["world"] == 8


def test_a_dry_run_shows_kinds_of_parameters_and_in_full_all(capsys, tmp_path):
    from megadit.mup import param_specs
    from megadit.train.entry import run

    arguments = ("configs/quickstart/digits.yaml", ["model.depth=3"], None, str(tmp_path), "auto")
    with pytest.raises(UserError, match="--full: belongs to --dry_run; add that, or leave it out"):
        run(*arguments, False, full=True)
    with pytest.raises(UserError, match="--full: is for the printed table, and --json prints the layout alone"):
        run(*arguments, True, world_size=8, as_json=True, full=True)
    tables = []
    for full in (False, True):
        assert run(*arguments, True, world_size=8, full=full) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append(lines[next(i for i, line in enumerate(lines) if line.startswith("name ")) + 2 :])
    kinds, every = ([line.split()[0] for line in table] for table in tables)
    config = load_config(arguments[0], arguments[1])
    names = list(param_specs(build_model(config.model, device="meta")))
    assert every == names
    assert kinds.count("blocks.*.attn.qkv.weight") == 1 and "×3" in tables[0][kinds.index("blocks.*.attn.qkv.weight")]
    assert sum(int(line.split("×")[1].split()[0]) if "×" in line else 1 for line in tables[0]) == len(names)
