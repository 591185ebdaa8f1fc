"""Who am I among the processes of this run, and on which device.

One program runs under plain ``python``, ``torchrun``, the ``deepspeed`` launcher and ``srun``. The last sets
no RANK and the first sets nothing at all, so the environment is completed here before torch or DeepSpeed
look at it. Nothing in this module needs DeepSpeed.
"""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError
from megadit.ownership import OwnershipLost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def first_slurm_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-06,9],x1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", node_list)
    if match is None:
        raise UserError(f"SLURM_JOB_NODELIST: '{node_list}' names no host; set MASTER_ADDR to the first host yourself")
    return match.group(1) + (match.group(2) or "") + match.group(3)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment(env: MutableMapping[str, str] | None = None) -> None:
    """Complete RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every way of starting.

    Under ``srun`` they come from the SLURM_* variables (the port from the numbers of job and step, so that
    those that share a node do not meet); under plain ``python`` they describe a single process.
    """
    env = os.environ if env is None else env
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        for name, slurm_name in _SLURM_NAMES.items():
            env[name] = env[slurm_name]
        # A step may run on some of its job's nodes only, and beside other steps of the job.
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        number = int(env.get("SLURM_JOB_ID", "0")) + 31 * int(env.get("SLURM_STEP_ID", "0"))
        env.setdefault("MASTER_ADDR", first_slurm_host(nodes))
        env.setdefault("MASTER_PORT", str(20000 + number % 20000))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        env.setdefault(name, value)
    env.setdefault("LOCAL_RANK", env["RANK"] if env["WORLD_SIZE"] == "1" else "0")
    if "MASTER_PORT" not in env:
        if env["WORLD_SIZE"] != "1":
            raise UserError("MASTER_PORT: not set for several processes; start them by torchrun, deepspeed or srun")
        env["MASTER_PORT"] = str(free_port())


@dataclass(frozen=True)
class ProcessContext:
    """This process among ``world_size`` others; every process holds one data-parallel rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files and talks to people."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum of ``values`` over all ranks (in place when there are several)."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on some rank."""
        if self.world_size == 1:
            return flag
        import torch

        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Any) -> Any:
        """Run ``action()`` on rank 0 only and give its result to all; its ``UserError`` is raised on all."""
        outcome: tuple[UserError | None, Any] = (None, None)
        if self.is_main:
            try:
                outcome = (None, action())
            except UserError as error:
                # A lost folder stays one on every rank: none of them writes there any more.
                kind = OwnershipLost if isinstance(error, OwnershipLost) else UserError
                outcome = (kind(str(error), everywhere=True), None)
        if self.world_size > 1:
            import torch.distributed as dist

            box = [outcome]
            dist.broadcast_object_list(box, src=0)
            outcome = box[0]
        if outcome[0] is not None:
            raise outcome[0]
        return outcome[1]


def start_processes(timeout_s: float = 1800.0) -> ProcessContext:
    """Join the process group (nccl on CUDA, else gloo) and bind this rank's device.

    ``timeout_s`` bounds every collective in seconds, those of groups made later too: a rank that hangs or died ends
    the others after it.
    """
    import torch
    import torch.distributed as dist

    prepare_environment()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        # One process needs no connection, and one of torch's waits for name servers, who tell it its own address.
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        _bound_new_groups(limit)
    return ProcessContext(rank, world, local, device)


def _bound_new_groups(limit: timedelta) -> None:
    """Give groups made from now on, DeepSpeed's included, the time limit of the first, which torch lets none inherit.

    Without it a rank that waits in one of them for a rank that hangs does so for gloo's own half an hour.
    """
    import torch.distributed as dist

    plain = getattr(dist.new_group, "__wrapped__", dist.new_group)

    @functools.wraps(plain)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = limit
        return plain(*args, **kwargs)

    dist.new_group = new_group


def stop_processes() -> None:
    """Leave the process group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
