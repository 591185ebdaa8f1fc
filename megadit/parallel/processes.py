"""The process group of this run: how its ranks meet, talk about small things, and which device each computes on.

Ranks meet in waits that end, hear signals and say who is missing: torch's own meeting waits in C++, where Python
answers no signal, half an hour long, and ends in a stack trace. Nothing here needs DeepSpeed, nor torch before ranks
start.
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

_RENDEZVOUS_S = 600.0  # for hosts that load libraries and data at different speeds; not for ranks that never come
_RESOLVE_S = 10.0  # a name that a cluster has just given out may need a moment to be known
_PROBE_S = 5.0
_TELL_S = 15.0  # of waiting, before it is told who is waited for
_SHOWN = 8  # missing ranks that are named
_KEY = "parallel.rendezvous_timeout_s"


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
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        # One process needs no connection, and one of torch's waits for name servers, who tell it its own address.
        store = dist.HashStore() if world == 1 else rendezvous(ranks, rendezvous_s or min(timeout_s, _RENDEZVOUS_S))
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


class RendezvousFailed(Exception):
    """Not all ranks came: a sentence for people with the address, who is missing and what to do (exit code 1)."""


def rendezvous(ranks: RankVariables, limit_s: float) -> Any:
    """A store that all ranks share, once all of them are here: rank 0 serves it, or torchrun's agent does.

    ``ranks`` holds the completed address; ``limit_s`` bounds the whole in seconds.

    Raises:
        UserError: MASTER_ADDR has no address, or MASTER_PORT is taken on rank 0's host.
        RendezvousFailed: ranks are missing after ``limit_s``, or rank 0 ended.
    """
    meeting = _Rendezvous(ranks, limit_s)
    store = meeting.join()
    meeting.wait_for_all(store)
    return store


class _Rendezvous:
    def __init__(self, ranks: RankVariables, limit_s: float) -> None:
        assert ranks.master_addr is not None and ranks.master_port is not None  # of a completed environment
        self.rank, self.world = ranks.rank, ranks.world_size
        self.host, self.port = ranks.master_addr, ranks.master_port
        self.limit_s, self.end = limit_s, time.monotonic() + limit_s
        self.where = f"{self.host}:{self.port} (MASTER_ADDR:MASTER_PORT)"

    def join(self) -> Any:
        """The store: served by rank 0, unless torchrun's agent does."""
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
        handle = listening.detach()
        return self._within_time(lambda: self._store("127.0.0.1", True, master_listen_fd=handle))

    def _store(self, host: str, serves: bool, **options: Any) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(
            host,
            self.port,
            self.world,
            serves,
            timeout=timedelta(seconds=self._left()),
            wait_for_workers=False,
            **options,
        )

    def _left(self) -> float:
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
        """Until somebody listens where rank 0 should."""
        self._resolve()
        pause, why, told = 0.05, "", time.monotonic() + _TELL_S
        while time.monotonic() < self.end:
            try:
                socket.create_connection((self.host, self.port), timeout=min(_PROBE_S, self._left())).close()
                return
            except OSError as error:
                why = error.strerror or str(error)
            if time.monotonic() > told and self.rank == 1:
                self._note(f"rank 0 does not answer yet ({why})")
                told = self.end
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        raise RendezvousFailed(
            f"rank {self.rank} of {self.world} found no rank 0 at {self.where} within {self.limit_s:g} s ({why}); "
            f"start all ranks, give the address of rank 0's host, open the port in its firewall, or raise {_KEY}"
        )

    def _within_time(self, action: Callable[[], Any]) -> Any:
        """``action``, which may wait in C++, in a thread, so that this one hears signals and the clock."""
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
                f"rank {self.rank} of {self.world} cannot join the ranks at {self.where}: "
                f"{str(error).splitlines()[0]}; another program may listen there: give another MASTER_PORT to all ranks"
            )
        return result

    def wait_for_all(self, store: Any) -> None:
        """Until every rank has put its name down."""
        pause, told = 0.02, time.monotonic() + _TELL_S
        try:
            store.set(f"here/{self.rank}", socket.gethostname())
            store.add("arrived", 1)
            while store.add("arrived", 0) < self.world:
                if time.monotonic() > self.end:
                    raise RendezvousFailed(
                        f"{self._missing(store)} within {self.limit_s:g} s at {self.where}; look for their error, "
                        f"start all ranks, make sure their hosts reach this address, or raise {_KEY}"
                    )
                if time.monotonic() > told and self.rank == 0:
                    self._note(self._missing(store))
                    told = self.end
                time.sleep(pause)
                pause = min(0.5, 1.5 * pause)
        except RuntimeError:  # torch's, of the connection
            raise RendezvousFailed(
                f"rank 0 at {self.where} ended before all {self.world} ranks were there, and so rank {self.rank} does: "
                "see its error"
            ) from None

    def _missing(self, store: Any) -> str:
        missing = [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]
        named = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
        ranks = f"rank{'s' if len(missing) > 1 else ''} {named}"
        return f"{self.world - len(missing)} of {self.world} ranks came, and {ranks} did not"

    def _note(self, text: str) -> None:
        print(f"note: {text}: waiting at {self.where} for at most {self._left():.0f} s", file=sys.stderr, flush=True)
