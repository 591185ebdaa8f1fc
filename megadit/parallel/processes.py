"""The process group of a run: rendezvous of its ranks, small collectives, and the device of each rank.

The rendezvous has a time limit, reacts to signals and names missing ranks. torch's own waits in C++, where Python
handles no signal, for half an hour, and ends in a stack trace. This module does not need DeepSpeed, and imports torch
only when ranks start.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError
from megadit.files.ownership import OwnershipLost
from megadit.parallel.environment import RankVariables, prepare_environment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RENDEZVOUS_S = 600.0  # hosts load libraries at different speeds
_RESOLVE_S = 10.0  # a name that a cluster has just assigned may not resolve at once
_CONNECT_S = 5.0
_NOTE_S = 15.0  # of waiting, before a note names the missing ranks
_SHOWN = 8  # missing ranks that are named
_KEY = "parallel.rendezvous_timeout_s"


@dataclass(frozen=True)
class ProcessContext:
    """This process, ``rank`` of ``world_size``, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce: element-wise sum of ``values`` over all ranks, in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank (collective)."""
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
        """All-gather: every rank's (small, picklable) value, in rank order."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Any) -> Any:
        """Run ``action()`` on rank 0 and broadcast its result; its ``UserError`` is raised on all ranks."""
        outcome: tuple[UserError | None, Any] = (None, None)
        if self.is_main:
            try:
                outcome = (None, action())
            except UserError as error:
                # The type is kept, since after lost ownership no rank may write to the folder.
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
    """Join the process group (nccl on CUDA, else gloo) and select this rank's device.

    timeout_s: limit of every collective, of groups made later too, after which the others end if a rank hangs or died.
    rendezvous_s: limit of the wait for all ranks; default 600 s, or ``timeout_s`` if that is less.

    Raises:
        UserError: the address of rank 0 cannot be used.
        RendezvousFailed: not all ranks joined in time.
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        # One process needs no TCP store, which would wait for name servers to resolve its own address.
        store = dist.HashStore() if world == 1 else rendezvous(ranks, rendezvous_s or min(timeout_s, _RENDEZVOUS_S))
        store.set_timeout(limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        _bound_new_groups(limit)
    return ProcessContext(rank, world, local, device)


def _bound_new_groups(limit: timedelta) -> None:
    """Give groups made from now on, DeepSpeed's included, the timeout of the first, which they do not inherit in torch.

    Without it a rank waits for a rank that hangs for gloo's default of half an hour.
    """
    import torch.distributed as dist

    original = getattr(dist.new_group, "__wrapped__", dist.new_group)

    @functools.wraps(original)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = limit
        return original(*args, **kwargs)

    dist.new_group = new_group


def stop_processes() -> None:
    """Leave the process group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class RendezvousFailed(Exception):
    """Not all ranks joined: one sentence with the address, the missing ranks and the remedy (exit code 1)."""


def rendezvous(ranks: RankVariables, limit_s: float) -> Any:
    """Wait for all ranks; returns the TCPStore that they share, served by rank 0 or by torchrun's agent.

    ranks: of a completed environment (``prepare_environment``).  limit_s: of the whole rendezvous, in seconds.

    Raises:
        UserError: MASTER_ADDR does not resolve, or MASTER_PORT is in use on rank 0's host.
        RendezvousFailed: ranks are missing after ``limit_s``, or rank 0 ended.
    """
    waiting = _Rendezvous(ranks, limit_s)
    store = waiting.join()
    waiting.wait_for_all(store)
    return store


class _Rendezvous:
    def __init__(self, ranks: RankVariables, limit_s: float) -> None:
        assert ranks.master_addr is not None and ranks.master_port is not None
        self.rank, self.world = ranks.rank, ranks.world_size
        self.host, self.port = ranks.master_addr, ranks.master_port
        self.limit_s, self.end = limit_s, time.monotonic() + limit_s
        self.address = f"{self.host}:{self.port} (MASTER_ADDR:MASTER_PORT)"

    def join(self) -> Any:
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return self._serve()
        self._wait_for_server()
        return self._within_time(lambda: self._store(self.host, False))

    def _serve(self) -> Any:
        self._resolve()
        dual = socket.has_dualstack_ipv6()
        try:
            listening = socket.create_server(
                ("", self.port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=4096
            )
        except OSError as error:
            raise UserError(
                f"MASTER_PORT: {self.port} cannot be used on {socket.gethostname()} ({error.strerror or error}); "
                "end the earlier job that holds it, or give another port to all ranks"
            ) from None
        descriptor = listening.detach()
        return self._within_time(lambda: self._store("127.0.0.1", True, master_listen_fd=descriptor))

    def _store(self, host: str, is_server: bool, **options: Any) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(
            host,
            self.port,
            self.world,
            is_server,
            timeout=timedelta(seconds=self._remaining_s()),
            wait_for_workers=False,
            **options,
        )

    def _remaining_s(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def _resolve(self) -> None:
        end = min(self.end, time.monotonic() + _RESOLVE_S)
        while True:
            try:
                socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"MASTER_ADDR: '{self.host}' has no address ({error.strerror or error}); give the name or "
                        "address of rank 0's host"
                    ) from None
            time.sleep(0.5)

    def _wait_for_server(self) -> None:
        """Until a process listens at rank 0's address."""
        self._resolve()
        pause, reason, note_at = 0.05, "", time.monotonic() + _NOTE_S
        while time.monotonic() < self.end:
            try:
                socket.create_connection((self.host, self.port), timeout=min(_CONNECT_S, self._remaining_s())).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > note_at and self.rank == 1:
                self._note(f"rank 0 does not answer yet ({reason})")
                note_at = self.end
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        raise RendezvousFailed(
            f"rank {self.rank} of {self.world} found no rank 0 at {self.address} within {self.limit_s:g} s ({reason}); "
            f"start all ranks, give the address of rank 0's host, open the port in its firewall, or raise {_KEY}"
        )

    def _within_time(self, action: Callable[[], Any]) -> Any:
        """Run ``action``, which may wait in C++, in a thread, so that this one handles signals and the time limit."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((action(), None))
            except Exception as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < self.end:
            thread.join(0.2)
        result, error = outcome[0] if outcome else (None, "it does not answer")
        if error is not None:
            raise RendezvousFailed(
                f"rank {self.rank} of {self.world} cannot join the ranks at {self.address}: "
                f"{str(error).splitlines()[0]}; another program may listen there: give another MASTER_PORT to all ranks"
            )
        return result

    def wait_for_all(self, store: Any) -> None:
        """Until every rank has registered in the store."""
        pause, note_at = 0.02, time.monotonic() + _NOTE_S
        try:
            store.set(f"here/{self.rank}", socket.gethostname())
            store.add("arrived", 1)
            while store.add("arrived", 0) < self.world:
                if time.monotonic() > self.end:
                    raise RendezvousFailed(
                        f"{self._missing(store)} within {self.limit_s:g} s at {self.address}; look for their error, "
                        f"start all ranks, make sure their hosts reach this address, or raise {_KEY}"
                    )
                if time.monotonic() > note_at and self.rank == 0:
                    self._note(self._missing(store))
                    note_at = self.end
                time.sleep(pause)
                pause = min(0.5, 1.5 * pause)
        except RuntimeError:  # torch's, of the connection
            raise RendezvousFailed(
                f"rank 0 at {self.address} ended before all {self.world} ranks were there, and so rank {self.rank} "
                "does: see its error"
            ) from None

    def _missing(self, store: Any) -> str:
        missing = [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]
        named = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
        ranks = f"rank{'s' if len(missing) > 1 else ''} {named}"
        return f"{self.world - len(missing)} of {self.world} ranks came, and {ranks} did not"

    def _note(self, text: str) -> None:
        print(
            f"note: {text}: waiting at {self.address} for at most {self._remaining_s():.0f} s",
            file=sys.stderr,
            flush=True,
        )
