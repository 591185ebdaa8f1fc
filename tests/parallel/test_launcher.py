"""Ranks end with the launcher that started them, and plain python does not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.ranks import ROOT, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")

# A launcher: starts the rank, writes its process id and waits.
AGENT = "import subprocess, sys; r = subprocess.Popen(sys.argv[2:]); open(sys.argv[1], 'w').write(str(r.pid)); r.wait()"
RANK = (
    "import sys, time; from megadit.parallel.environment import read_rank_variables; "
    "from megadit.parallel.launcher import exit_with_launcher; "
    "print(exit_with_launcher(read_rank_variables()), flush=True); time.sleep(120)"
)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def gone(pid, within_s=30.0):
    """Whether the process ends; the time is for a loaded machine, it takes milliseconds."""
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


@contextlib.contextmanager
def started(command, folder, **env):
    """The process ids of a launcher and of the one rank that it started; both are ended afterwards."""
    note, out = folder / "pid", open(folder / "out", "w")  # noqa: SIM115 - the processes write to it
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(note), *command],
        env={**os.environ, "PYTHONPATH": path, **env}, cwd=ROOT, stdout=out, stderr=out,
    )  # fmt: skip
    rank = None
    try:
        while not note.exists() or not note.read_text():
            assert agent.poll() is None
            time.sleep(0.02)
        rank = int(note.read_text())
        yield agent, rank
    finally:
        agent.kill()
        agent.wait()
        out.close()
        if rank is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def wait_for_output(folder, text, process, within_s=60.0):
    end = time.monotonic() + within_s
    while text not in (folder / "out").read_text():
        assert time.monotonic() < end and alive(process), (folder / "out").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("env", [TORCHRUN, OPENMPI, STEP], ids=["torchrun", "mpirun", "srun"])
def test_a_rank_ends_with_its_killed_launcher(tmp_path, env):
    with started([sys.executable, "-c", RANK], tmp_path, **env) as (agent, rank):
        wait_for_output(tmp_path, "True", rank)
        agent.kill()
        agent.wait()
        assert gone(rank)


@pytest.mark.parametrize(
    "env",
    [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, {**STEP, "SLURM_TASK_PID": "1"}],
    ids=["plain", "child of a run", "by hand", "from a shell in a task"],
)
def test_plain_python_outlives_its_shell(tmp_path, env):
    """As nohup and tmux mean it to."""
    with started([sys.executable, "-c", RANK], tmp_path, **env) as (agent, rank):
        wait_for_output(tmp_path, "False", rank)
        agent.kill()
        agent.wait()
        time.sleep(0.3)
        assert alive(rank)


@pytest.mark.distributed
def test_a_rank_that_waits_for_the_others_ends_with_its_launcher(tmp_path):
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/digits.yaml", "--run_dir"]
    env = {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with started([*command, str(tmp_path / "run")], tmp_path, **env) as (agent, rank):
        time.sleep(1.0)  # the interpreter has begun: libraries are imported or the rank waits already
        agent.kill()
        agent.wait()
        assert gone(rank)
