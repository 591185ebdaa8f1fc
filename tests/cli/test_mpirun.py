"""Ranks that a real ``mpirun`` starts form one job."""

import json
import shutil
import sys

import pytest

from helpers.ranks import run_command

SMALL = ["model.width=32", "model.head_dim=16", "model.heads=null", "train.global_batch=16", "train.steps=2"]
OPENMPI = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
MPICH = ["mpirun.mpich", "-n", "2"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [OPENMPI, MPICH], ids=["openmpi", "mpich"])
def test_two_processes_train_one_model(tmp_path, launcher):
    if shutil.which(launcher[0]) is None:
        pytest.skip(f"{launcher[0]} is not installed, so that nothing was tested with it")
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/digits.yaml"]
    done = run_command([*launcher, *command, "--run_dir", str(tmp_path / "run"), *SMALL])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/environment.json").read_text())["ranks"] == 2
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0
