"""Checks of process groups, and of a real optimizer step through DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from megadit.doctor.report import Check, State, failure_line, quiet
from megadit.errors import UserError
from megadit.parallel.environment import child_environment, read_rank_variables

STEP_TIMEOUT_S = 120.0
NAMES_TIMEOUT_S = 3.0


def check_distributed() -> Iterator[Check]:
    """Launcher, gloo by a real collective, name service, NCCL's version and DeepSpeed's accelerator."""
    yield _launcher()
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:
        yield Check("distributed", "torch.distributed", "broken", failure_line(error), "make setup", needed=True)
        return
    yield _gloo(dist)
    yield _name_service()
    if dist.is_nccl_available():
        yield Check("distributed", "nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Check("distributed", "nccl", "missing", "this torch is built without it; several GPUs need it")
    with quiet():
        yield _accelerator(torch.cuda.is_available())


def _launcher() -> Check:
    """The launcher whose variables are in the environment; broken where they contradict each other."""
    try:
        ranks = read_rank_variables()
    except UserError as error:
        problem, _, remedy = str(error).partition("; ")
        return Check("distributed", "launcher", "broken", problem, remedy)
    detail = f"{ranks.launcher}: rank {ranks.rank} of {ranks.world_size}"
    if ranks.launcher == "python":
        detail = "none: plain python is one process"
    return Check("distributed", "launcher", "ok", detail)


def _gloo(dist: Any) -> Check:
    import torch

    remedy = "the host's own name must resolve (/etc/hosts), or set GLOO_SOCKET_IFNAME to a network interface"
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            value = torch.ones(4)
            dist.all_reduce(value)
            assert float(value.sum()) == 4.0
        finally:
            dist.destroy_process_group()
    except Exception as error:
        return Check("distributed", "gloo", "broken", failure_line(error), remedy)
    return Check("distributed", "gloo", "ok", "one collective on one rank")


def _name_service() -> Check:
    """Torch looks up the name of every address that connects, in this form; a silent server costs 10 s each time."""
    begin = time.monotonic()
    lookup = threading.Thread(target=_reverse_lookup, daemon=True)
    lookup.start()
    lookup.join(NAMES_TIMEOUT_S)
    if lookup.is_alive():
        detail = f"no answer for 127.0.0.1 within {NAMES_TIMEOUT_S:g} s: ranks wait at every connection"
        remedy = "name a server that answers in /etc/resolv.conf, or export RES_OPTIONS='timeout:1 attempts:1'"
        return Check("distributed", "name service", "broken", detail, remedy)
    return Check("distributed", "name service", "ok", f"{1000 * (time.monotonic() - begin):.0f} ms for 127.0.0.1")


def _reverse_lookup() -> None:
    with contextlib.suppress(OSError):
        socket.getnameinfo(("::ffff:127.0.0.1", 1), socket.NI_NUMERICSERV)


def _accelerator(has_cuda: bool) -> Check:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_cuda else "cpu")
    try:
        from deepspeed.accelerator import get_accelerator

        name = str(get_accelerator()._name)
    except Exception as error:
        return Check("distributed", "DeepSpeed device", "broken", failure_line(error), "make setup", needed=True)
    expected = "cuda" if has_cuda else "cpu"
    state: State = "ok" if name == expected else "broken"
    return Check("distributed", "DeepSpeed device", state, name, f"unset DS_ACCELERATOR: torch would use {expected}")


def start_step() -> subprocess.Popen[str]:
    """Start one optimizer step in a process of its own, so that a hang or a crash is only reported."""
    command = [sys.executable, "-c", "from megadit.doctor.training import training_step; training_step()"]
    environment, nothing, pipe = child_environment(os.environ), subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=nothing, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
    )


def check_step(process: subprocess.Popen[str], timeout_s: float = STEP_TIMEOUT_S) -> Check:
    """The result of ``start_step()``, after at most ``timeout_s`` seconds."""
    try:
        _, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        detail, remedy = f"no end after {timeout_s:g} s", "see build locks and gloo above"
        return Check("training", "DeepSpeed step", "broken", detail, remedy, needed=True)
    if process.returncode:
        last = (stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return Check("training", "DeepSpeed step", "broken", last[:200], "see the lines above", needed=True)
    return Check("training", "DeepSpeed step", "ok", "ZeRO 1, one step of a linear layer", needed=True)


def training_step() -> None:
    """Train a linear layer for one step at ZeRO stage 1. Raises whatever goes wrong."""
    import torch

    from megadit.engine.deepspeed.partitions import avoid_shm_build
    from megadit.parallel import start_processes, stop_processes

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    context = start_processes(timeout_s=60)
    avoid_shm_build()
    import deepspeed

    model = torch.nn.Linear(4, 4).to(context.device)
    before = model.weight.detach().clone()
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "gradient_clipping": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(1, 4, device=context.device)).square().mean())
    engine.step()
    if torch.equal(before, engine.module.weight):
        raise RuntimeError("the step left the weights as they were")
    stop_processes()
