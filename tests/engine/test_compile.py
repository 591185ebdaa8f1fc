"""train.compile: the same losses to rounding, and one sentence where it cannot work."""

import json
import shutil
import sys

import pytest
import torch

from helpers.ranks import ROOT, run_command
from megadit.errors import UserError
from megadit.parallel.compilation import check_compiler

SMALL = [
    "model.depth=1", "model.width=32", "model.base_width=32", "train.steps=4", "train.log_every=1",
    "train.validation_images=0", "train.tensorboard=false", "sample.count=1", "sample.steps=1", "sample.guidance=1",
    "parallel.zero_stage=1", "train.global_batch=16",
]  # fmt: skip


def train(folder, *overrides, **env):
    argv = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(ROOT / "configs/quickstart/digits.yaml")]
    return run_command([*argv, "--run_dir", str(folder), *SMALL, *overrides], env=env, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler: what torch.compile makes is NOT tested"
)
def test_losses_are_those_of_the_plain_model(tmp_path):
    losses = []
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        done = train(tmp_path / name, f"train.compile={compiled}", TORCHDYNAMO_DISABLE=None)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_compiler_is_one_sentence(tmp_path):
    missing = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = train(tmp_path / "run", "train.compile=true", TORCHDYNAMO_DISABLE=None, **missing)
    assert done.returncode == 2 and "train.compile: true, but torch.compile does not work here" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_switched_off_is_told(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UserError, match="TORCHDYNAMO_DISABLE=1 switches"):
        check_compiler(torch.device("cpu"))
