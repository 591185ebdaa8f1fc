"""Worker processes and their heartbeats: a worker of this host is looked up by its process id, others by heartbeat."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megadit.files.json_text import parse_json
from megadit.files.owner_file import process_namespace, process_start_time
from megadit.train.run_dir import write_json


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class WorkerId:
    """One worker process (rank 0, where it has several)."""

    host: str
    place: str  # of its process ids: kernel start and namespace
    pid: int
    started: str

    @property
    def label(self) -> str:
        """The stem of its files in ``workers/``."""
        return f"{self.host}-{self.pid}"

    @property
    def is_here(self) -> bool:
        """Whether its process id means something in this process's view of the machine."""
        return self.place == process_namespace()

    @property
    def is_running(self) -> bool:
        """Of a worker that ``is_here``: whether the process lives."""
        return process_start_time(self.pid) == self.started


def this_worker() -> WorkerId:
    """The calling process."""
    return WorkerId(socket.gethostname(), process_namespace(), os.getpid(), process_start_time(os.getpid()) or "")


class Heartbeats:
    """The heartbeat of every worker: a file in ``workers/`` whose modification time is refreshed.

    Times are those of the file system, so that hosts whose clocks differ can compare them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, worker: WorkerId) -> Path:
        return self.folder / f"{worker.label}.alive"

    @contextlib.contextmanager
    def beating(self, worker: WorkerId, every_s: float) -> Iterator[None]:
        """Refresh the file of ``worker`` from a thread as long as the block runs; remove it afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, stop = self._file(worker), threading.Event()
        write_json(file, asdict(worker))

        def beat() -> None:
            while not stop.wait(every_s):
                with contextlib.suppress(OSError):
                    os.utime(file)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            file.unlink(missing_ok=True)

    def is_dead(self, worker: WorkerId, stale_after_s: float) -> bool:
        """Whether the worker has ended: by its process on this host, else by the age of its heartbeat."""
        if worker.is_here:
            return not worker.is_running
        with contextlib.suppress(OSError):
            return self._now() - self._file(worker).stat().st_mtime > stale_after_s
        return True

    def living(self, stale_after_s: float) -> list[WorkerId]:
        """The workers that have a file and are not dead."""
        return [worker for worker in self._recorded() if not self.is_dead(worker, stale_after_s)]

    def clear_dead(self) -> None:
        """Remove the heartbeat files of killed workers of this host."""
        for worker in self._recorded():
            if worker.is_here and not worker.is_running:
                with contextlib.suppress(OSError):
                    self._file(worker).unlink(missing_ok=True)

    def _recorded(self) -> Iterator[WorkerId]:
        """The workers that have a file."""
        for file in sorted(self.folder.glob("*.alive")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                yield WorkerId(**parse_json(file.read_bytes()))

    def _now(self) -> float:
        """The file system's clock; read-only folders fall back to this host's."""
        probe = self.folder / f".now-{socket.gethostname()}-{os.getpid()}"
        try:
            probe.write_text("", encoding="utf-8")
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
