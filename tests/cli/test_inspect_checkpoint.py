"""tools/inspect_checkpoint.py: what it says of a sound, a damaged and a different checkpoint, and its exit codes."""

import json
import shutil

import pytest

from helpers.ranks import run_ranks
from helpers.training import small_config, train_rank
from megadit.cli import inspect_checkpoint
from megadit.errors import UserError


@pytest.fixture(scope="module")
def main():
    return inspect_checkpoint.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Step 2 of two ranks under ZeRO-3."""
    config = small_config(parallel={"zero_stage": 3}, ema={"decays": (0.5,)})
    path = tmp_path_factory.mktemp("run")
    run_ranks(2, train_rank, config, str(path), 2)
    return path


def inspect_json(main, capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.distributed
def test_a_sound_one(main, folder, capsys):
    code, report = inspect_json(main, capsys, folder, "--verify", "--diff", folder, "--norms")
    assert code == 0 and report["problems"] == []
    summary = report["summary"]
    assert summary["step"] == 2
    assert summary["layout"] == {"ranks": 2, "zero_stage": 3, "tensor": 1, "pipeline": 1}
    assert summary["bytes"].keys() == {"weights", "exp_avg", "exp_avg_sq", "ema/0.5"}
    assert set(summary["bytes"].values()) == {4 * summary["elements"]}
    row = summary["tensors"]["final_layer.linear.weight"]
    assert row["shape"] == [4, 32] and row["weights"] > 0
    assert report["diff"]["same"] and report["diff"]["tensors"] == []
    assert main([str(folder), "--verify"]) == 0
    assert "all checksums agree" in capsys.readouterr().out


@pytest.mark.distributed
def test_damage_and_difference_are_exit_code_3(main, folder, capsys, tmp_path):
    other = shutil.copytree(folder / "checkpoints/step-00000002", tmp_path / "step-00000002")
    path = other / "fragments-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    code, report = inspect_json(main, capsys, other, "--verify")
    assert code == 3 and len(report["problems"]) == 1 and "wrong checksum" in report["problems"][0]
    longer = tmp_path / "longer"
    config = small_config(optim={"lr": 1e-3}, ema={"decays": (0.5,)})
    run_ranks(1, train_rank, config, str(longer), 3, str(folder / "checkpoints/step-00000002"))
    code, report = inspect_json(main, capsys, folder, "--diff", longer)
    assert code == 3 and not report["diff"]["same"]
    assert report["diff"]["counters"]["step"] == [2, 3]
    assert 0 < report["diff"]["kinds"]["weights"]["max_abs"] < 0.1
    assert "optim.lr 0.004 → 0.001" in report["diff"]["config"]
    assert main([str(folder), "--diff", str(longer)]) == 3
    assert "weights: " in capsys.readouterr().out


@pytest.mark.distributed
def test_verifying_a_run_does_not_pass_over_its_newest(main, folder, capsys, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    newest = run / "checkpoints/step-00000003"
    shutil.copytree(run / "checkpoints/step-00000002", newest)
    (run / "checkpoints/latest").write_text("step-00000003\n")
    (newest / "fragments-00000.safetensors").unlink()
    code, report = inspect_json(main, capsys, run, "--verify")
    assert code == 3 and report["summary"]["step"] == 2
    assert len(report["problems"]) == 1 and "fragments-00000.safetensors is missing" in report["problems"][0]
    assert main([str(run)]) == 0
    capsys.readouterr()
    assert inspect_json(main, capsys, newest, "--verify")[1]["problems"] == report["problems"]
    with pytest.raises(UserError, match="is missing"):
        main([str(newest)])
    (run / "checkpoints/step-00000002/state.json").unlink()
    assert inspect_json(main, capsys, run, "--verify")[0] == 3


def test_what_is_no_checkpoint(main, tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        main([str(tmp_path)])
