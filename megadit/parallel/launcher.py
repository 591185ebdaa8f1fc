"""Ranks end with their launcher, and without a launcher a command starts its own ranks on this machine.

A rank that outlived its launcher would go on training beside its successor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.parallel.environment import RankVariables, child_environment, free_port, read_rank_variables

_PR_SET_PDEATHSIG = 1
_RUNNER_POLL_S = 1.0
# Launchers that may be process 1 of a container, which is also the parent of orphans.
_LAUNCHER_PROGRAM = re.compile(r"python|torchrun|deepspeed|accelerate|mpi|orte|prte|hydra|slurmstepd|pmi")
_RANK_POLL_S = 0.1
_GRACE_S = 5.0  # after the first failure, for the other ranks to print their errors and end


def set_parent_death_signal(number: int = signal.SIGTERM, libc: Any = None) -> None:
    """Have the kernel send this process the signal when the thread that started it ends, for any reason (Linux)."""
    if sys.platform == "linux":
        (libc or ctypes.CDLL(None)).prctl(_PR_SET_PDEATHSIG, number)


def exit_with_launcher(ranks: RankVariables) -> bool:
    """Have this rank killed when its launcher ends, before the process group is up as well as within a step.

    Not under plain ``python`` or in a shell inside a Slurm task, where ``nohup`` and ``tmux`` must keep their effect.
    Returns whether the rank will end with its launcher. If the launcher has already ended, so does this process (1).
    """
    if sys.platform != "linux" or ranks.launcher in ("python", "variables"):
        return False
    if ranks.launcher == "srun" and os.environ.get("SLURM_TASK_PID", str(os.getpid())) != str(os.getpid()):
        return False
    parent = os.getppid()
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent or (parent == 1 and not _LAUNCHER_PROGRAM.search(_program(1))):
        os.write(2, b"error: the launcher of this rank ended before the rank began, and so it ends, too\n")
        os._exit(1)
    if ranks.launcher == "deepspeed":
        _exit_with_runner(parent)
    return True


def _exit_with_runner(launcher: int) -> None:
    """On the host where ``deepspeed`` was typed the launcher is a child of that command, and does not end with it."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(launcher)
        runner = process.ppid()
        if "deepspeed" in _program(runner):
            threading.Thread(target=_watch_runner, args=(process, runner), daemon=True).start()


def _watch_runner(launcher: Any, runner: int) -> None:
    """Kill this process once the launcher (psutil's) is no child of ``runner`` any more."""
    import psutil

    with contextlib.suppress(psutil.Error):
        while launcher.ppid() == runner:
            time.sleep(_RUNNER_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _program(pid: int) -> str:
    """The first two words of a process's command line, without their folders; empty where it cannot be read."""
    import psutil

    try:
        return " ".join(Path(word).name for word in psutil.Process(pid).cmdline()[:2])
    except psutil.Error:
        return ""


def check_rank_count(size: int, option: str) -> int:
    """The number of ranks that a launcher started, 1 or the ``size`` that ``option`` asks for; they end with it.

    Raises:
        UserError: it is another number.
    """
    ranks = read_rank_variables()
    if ranks.world_size not in (1, size):
        raise UserError(
            f"{option} {size}: {ranks.world_size} processes were started; start {size}, or none by a launcher"
        )
    exit_with_launcher(ranks)
    return ranks.world_size


def run_local_ranks(count: int, argv: Sequence[str]) -> int:
    """Run ``python ARGV`` as ``count`` ranks of one group; returns 0, or the exit code of the first rank that fails.

    When a rank fails, the others are killed. Only rank 0 keeps its standard output.
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            env = child_environment(os.environ) | {"MEGADIT_COPIES": str(count), "MASTER_ADDR": "127.0.0.1"}
            env |= {name: str(value) for name, value in numbers.items()}
            out = None if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen([sys.executable, *argv], env=env, stdout=out))
        return _wait_for_ranks(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait_for_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or one has failed and the others had time to end."""
    while True:
        codes = [process.poll() for process in processes]
        failures = [code for code in codes if code]
        if failures:
            end = time.monotonic() + _GRACE_S
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
            return failures[0] if failures[0] > 0 else 1
        if None not in codes:
            return 0
        time.sleep(_RANK_POLL_S)
