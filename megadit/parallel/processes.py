"""The process group of this run, and which device a rank computes on. Nothing in this module needs DeepSpeed."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError
from megadit.files.ownership import OwnershipLost
from megadit.parallel.environment import first_slurm_host, prepare_environment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "RENDEZVOUS_S",
    "ProcessContext",
    "first_slurm_host",
    "prepare_environment",
    "start_processes",
    "stop_processes",
]

RENDEZVOUS_S = 600.0  # for hosts that load libraries and data at different speeds; not for ranks that never come


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


def start_processes(timeout_s: float = 1800.0, rendezvous_s: float | None = None) -> ProcessContext:
    """Join the process group (nccl on CUDA, else gloo) and bind this rank's device.

    ``timeout_s`` bounds every collective in seconds, those of groups made later too: a rank that hangs or died ends
    the others after it. ``rendezvous_s`` bounds the wait for all ranks to come; default 600 s, or the former if less.

    Raises:
        UserError: the address of rank 0 cannot be used.
        RendezvousFailed: not all ranks came in time.
    """
    import torch
    import torch.distributed as dist

    ranks = prepare_environment()
    rank, world, local = ranks.rank, ranks.world_size, ranks.local_rank or 0
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        from megadit.parallel.rendezvous import meet

        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        # One process needs no connection, and one of torch's waits for name servers, who tell it its own address.
        store = dist.HashStore() if world == 1 else meet(ranks, rendezvous_s or min(timeout_s, RENDEZVOUS_S))
        store.set_timeout(limit)
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
