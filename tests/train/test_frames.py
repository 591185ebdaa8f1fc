"""How deep the call of DeepSpeed lies: who follows the command to it reads six functions of megadit's."""

import os
import traceback

import pytest

import megadit
from helpers.ranks import run_ranks
from megadit.cli.pretrain import main

PACKAGE = os.path.dirname(megadit.__file__) + os.sep
MOST = 6


def frames(folder, *overrides):
    """The functions of megadit's on the way from the command to DeepSpeed's step, as this rank's stack tells them."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megadit.train import prepare

    prepare.check_ds_config = lambda *_, **__: None  # it is for a process whose group is not up yet, as it is here
    stacks = []

    def watched(plain):
        def call(*args, **kwargs):
            package_frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            stacks.append([f"{frame.filename.removeprefix(PACKAGE)}:{frame.name}" for frame in package_frames])
            return plain(*args, **kwargs)

        return call

    pipeline = "parallel.pipeline=2" in overrides
    owner, name = (PipelineEngine, "train_batch") if pipeline else (DeepSpeedEngine, "step")
    setattr(owner, name, watched(getattr(owner, name)))
    words = [
        "--config",
        "configs/quickstart/digits.yaml",
        "--run_dir",
        folder,
        "train.steps=1",
        "train.tensorboard=false",
    ]
    assert main([*words, "train.validation_images=0", "sample.count=1", "sample.steps=1", *overrides]) == 0
    return stacks


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "overrides"), [(1, []), (2, ["parallel.pipeline=2"])], ids=["alone", "pipeline"])
def test_six_frames_from_the_command_to_the_step(tmp_path, world, overrides):
    for stacks in run_ranks(world, frames, str(tmp_path), *overrides):
        assert stacks
        for stack in stacks:
            assert stack[0] == "cli/pretrain.py:main"
            assert stack[-1].startswith("engine/")
            assert len(stack) <= MOST, stack
