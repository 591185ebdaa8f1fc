"""Ranks and what starts them: they end with their launcher, and without one a command starts its own on this machine.

A rank whose launcher is gone would train on, beside its successor.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.parallel.environment import RankVariables, child_environment, free_port, read_rank_variables

_PR_SET_PDEATHSIG = 1
_LOOK_S = 1.0
# Launchers that may be the first process of a container, which orphans would have for a parent, too.
_LAUNCHER_PROGRAM = re.compile(r"python|torchrun|deepspeed|accelerate|mpi|orte|prte|hydra|slurmstepd|pmi")
_POLL_S = 0.1
_GRACE_S = 5.0  # for the others to end by themselves, and tell why


def set_parent_death_signal(number: int = signal.SIGTERM, libc: Any = None) -> None:
    """Have the kernel send this process the signal when the thread that started it ends, however that is (Linux)."""
    if sys.platform == "linux":
        (libc or ctypes.CDLL(None)).prctl(_PR_SET_PDEATHSIG, number)


def exit_with_launcher(ranks: RankVariables, env: Mapping[str, str] | None = None) -> bool:
    """End with the launcher, by SIGKILL: before the process group is up, too, and in the middle of a step.

    Never under plain ``python`` or from a shell inside a task of Slurm's: what ``nohup`` and ``tmux`` protect lives on.
    Returns whether the lives are tied. A launcher that is gone already ends the process here.
    """
    env = os.environ if env is None else env
    if sys.platform != "linux" or ranks.launcher in ("python", "variables"):
        return False
    if ranks.launcher == "srun" and env.get("SLURM_TASK_PID", str(os.getpid())) != str(os.getpid()):
        return False
    parent = os.getppid()
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent or (parent == 1 and not _LAUNCHER_PROGRAM.search(_program(1))):
        told = "error: the launcher of this rank ended before the rank began, and so it ends, too"
        os.write(2, f"{told}\n".encode())
        os._exit(1)
    if ranks.launcher == "deepspeed":
        _die_with_runner(parent)
    return True


def _die_with_runner(launcher: int) -> None:
    """On the host where ``deepspeed`` was typed its launcher has that for a parent, and does not end with it."""
    runner = _parent_of(launcher)
    if runner is None or "deepspeed" not in _program(runner):
        return

    def watch() -> None:
        while _parent_of(launcher) == runner:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _parent_of(pid: int) -> int | None:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except OSError:
        return None


def _program(pid: int) -> str:
    """The first two words of a process's command line, without their folders."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:2]
    except OSError:
        return ""
    return " ".join(Path(word).name for word in words)


def check_rank_count(size: int, option: str) -> int:
    """How many ranks a launcher started, where ``option`` asks for ``size``; their lives are tied to it.

    Raises:
        UserError: they are neither one nor ``size``.
    """
    ranks = read_rank_variables()
    if ranks.world_size not in (1, size):
        raise UserError(
            f"{option} {size}: {ranks.world_size} processes were started; start {size}, or none by a launcher"
        )
    exit_with_launcher(ranks)
    return ranks.world_size


def run_local_ranks(count: int, argv: Sequence[str]) -> int:
    """Run ``python ARGV`` as ``count`` ranks of one group and wait; the first exit code that is not that of success.

    When one ends with an error, the others are ended too. Only rank 0 keeps its standard output.
    """
    port = free_port()
    copies = []
    try:
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            env = child_environment(os.environ) | {"MEGADIT_COPIES": str(count), "MASTER_ADDR": "127.0.0.1"}
            env |= {name: str(value) for name, value in place.items()}
            out = None if rank == 0 else subprocess.DEVNULL
            copies.append(subprocess.Popen([sys.executable, *argv], env=env, stdout=out))
        return _first_code(copies)
    finally:
        for copy in copies:
            if copy.poll() is None:
                copy.kill()
            copy.wait()


def _first_code(copies: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [copy.poll() for copy in copies]
        failed = [code for code in codes if code]
        if failed:
            end = time.monotonic() + _GRACE_S
            for copy in copies:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    copy.wait(max(0.0, end - time.monotonic()))
            return failed[0] if failed[0] > 0 else 1
        if None not in codes:
            return 0
        time.sleep(_POLL_S)
