"""The meeting of all ranks before their process group is made, in waits that end, hear signals and say who is missing.

Torch's own meeting waits in C++, where Python answers no signal, half an hour long, and ends in a stack trace.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megadit.errors import UserError
from megadit.parallel.environment import RankVariables

_RESOLVE_S = 10.0  # a name that a cluster has just given out may need a moment to be known
_PROBE_S = 5.0
_TELL_S = 15.0  # of waiting, before it is told who is waited for
_SHOWN = 8  # missing ranks that are named


class RendezvousFailed(Exception):
    """Not all ranks came: a sentence for people with the address, who is missing and what to do (exit code 1)."""


def meet(ranks: RankVariables, limit_s: float) -> Any:
    """A store that all ranks share, once all of them are here: rank 0 serves it, or torchrun's agent does.

    ``ranks`` holds the completed address; ``limit_s`` bounds the whole in seconds.

    Raises:
        UserError: MASTER_ADDR has no address, or MASTER_PORT is taken on rank 0's host.
        RendezvousFailed: ranks are missing after ``limit_s``, or rank 0 ended.
    """
    meeting = _Meeting(ranks, limit_s)
    store = meeting.join()
    meeting.wait_for_all(store)
    return store


class _Meeting:
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


_KEY = "parallel.rendezvous_timeout_s"
