"""A rank that raises, dies or hangs ends the others within the time limit, whatever they share with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from helpers import ranks
from helpers.ranks import free_port, run_command, run_ranks
from helpers.training import assemble_rank, small_config, train_on
from megadit.config import RunConfig

LIMIT_S = 20.0  # of a collective in these tests
LAYOUTS = {
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "tensor and pipeline": (4, {"tensor": 2, "pipeline": 2}),
}


class PlantedError(Exception):
    """The fault."""


def raises() -> None:
    raise PlantedError("planted")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(10 * LIMIT_S)


def config_of(**parallel: Any) -> RunConfig:
    return small_config(parallel=parallel, train={"micro_batch": 8, "steps": 50})


def come_to_grief(config: RunConfig, folder: str, fault: Callable[[], None]) -> None:
    """Train; in the third micro batch's second block the last rank has ``fault``. How others end goes to a file."""
    import torch.distributed as dist

    from megadit.models import stages

    run = assemble_rank(config, folder)
    rank, calls, plain = dist.get_rank(), [0], stages.run_block

    def run_block(*args: Any) -> Any:
        calls[0] += 1
        if rank == dist.get_world_size() - 1 and calls[0] == 6:
            fault()
        return plain(*args)

    stages.run_block = run_block  # type: ignore[assignment]
    begin = time.monotonic()
    try:
        train_on(run, 50)
    except Exception as error:
        record = {"error": f"{type(error).__name__}: {error}", "s": time.monotonic() - begin}
        Path(folder, f"end-{rank}.json").write_text(json.dumps(record))
        raise


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The others are not killed after the first failure: they are to end by themselves."""
    monkeypatch.setattr(ranks, "GRACE_S", 3 * LIMIT_S)
    yield


@pytest.mark.distributed
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", [raises, dies])
def test_the_others_end_too(tmp_path: Path, layout: str, fault: Callable[[], None]) -> None:
    world, parallel = LAYOUTS[layout]
    with pytest.raises(PlantedError if fault is raises else Exception) as error:
        run_ranks(world, come_to_grief, config_of(**parallel), str(tmp_path), fault, timeout=3 * LIMIT_S)
    assert "within" not in str(error.value), "ranks had to be killed"
    ends = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("end-*.json")}
    assert len(ends) == world - (fault is dies)
    assert all(end["s"] < 2 * LIMIT_S for end in ends.values())


def hang_limited(config: RunConfig, folder: str) -> None:
    """As a run with ``parallel.timeout_s`` makes its groups."""
    import torch.distributed as dist

    from megadit.parallel import processes

    processes._bound_new_groups(timedelta(seconds=3))
    group = dist.new_group(list(range(dist.get_world_size())))
    if dist.get_rank():
        time.sleep(20)
        return
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="(?i)timed out"):
        dist.barrier(group=group)
    assert time.monotonic() - begin < 15
    raise PlantedError("given up in time")


@pytest.mark.distributed
def test_groups_made_later_have_the_time_limit_too(tmp_path: Path) -> None:
    with pytest.raises(PlantedError, match="given up in time"):
        run_ranks(2, hang_limited, config_of(), str(tmp_path), timeout=60)


COMMAND = ["tests/helpers/faulty_pretrain.py", "--config", "configs/quickstart/digits.yaml"]
COMMAND += ["model.width=32", "model.heads=2", "model.depth=2", "train.steps=50", "train.global_batch=16"]
COMMAND += ["train.validation_images=0", "sample.count=4", "sample.steps=2", "train.tensorboard=false"]
COMMAND += ["parallel.tensor=2"]
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    "plain": [sys.executable, "-c", "from megadit.parallel.launcher import run_local_ranks; import sys; "
              "sys.exit(run_local_ranks(2, sys.argv[1:]))"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fault", ["1:20:raise", "1:20:kill", "1:20:stop", "1:0:config"])
def test_a_command_ends_and_says_why(tmp_path: Path, launcher: str, fault: str) -> None:
    start = [str(free_port()) if part == "PORT" else part for part in LAUNCHERS[launcher]]
    folder = tmp_path / "run"
    env = {"FAULT": fault, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    limit = 15 if fault.endswith("stop") else 120
    begin = time.monotonic()
    command = [*start, *COMMAND, f"parallel.timeout_s={limit}", "--run_dir", str(folder)]
    done = run_command(command, env=env, timeout=400)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    if fault.endswith("raise"):
        ended = json.loads((folder / "exit.json").read_text())
        assert "PlantedError: planted on rank 1" in output and "planted on rank 1" in ended["reason"]
        assert "rank0]: Traceback" not in output, "what followed buries the error"
        assert "planted on rank 1" in "\n".join(output.strip().splitlines()[-12:]) or launcher != "torchrun"
    elif fault.endswith("stop"):
        assert "longer than parallel.timeout_s, 15 s" in output and time.monotonic() - begin < 200
        reason = json.loads((folder / "exit.json").read_text())["reason"]
        assert "Timed out" in reason and "longer than parallel.timeout_s, 15 s" in reason
    elif fault.endswith("config"):
        assert "optim.lr is 0.0078125 on rank 0, 0.123 on rank 1" in output
