"""The local workers of ``launch/sweep.py run``: bound to cores and GPUs, restarted when they die, ended with it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_PREEMPTED, UserError, say
from megadit.parallel.environment import child_environment
from megadit.parallel.launcher import set_parent_death_signal
from megadit.plugins import loaded_plugins
from megadit.search.study.spec import WorkersSpec
from megadit.search.study.study import Study
from megadit.search.workers.worker import STOP
from megadit.train.preemption import signal_handlers

_RESTART_S = 1.0
# A trial that kills each of its workers is given up after max_attempts and the next worker gets on; but where one death
# follows another and no trial ends well, something else is wrong.
_MAX_DEATHS = 10
_POLL_S = 0.2
_LOG_TAIL = 2000


@dataclass(frozen=True)
class DeviceSlot:
    """What a worker is bound to: CPU cores and GPUs, by number (the latter as CUDA_VISIBLE_DEVICES names them)."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]


def assign_devices(workers: WorkersSpec, count: int, cores: list[int], gpus: list[str]) -> list[DeviceSlot]:
    """A device slot for each of ``count`` workers, among this machine's cores and GPUs.

    Cores are assigned round-robin where there are too few. Raises UserError where there are too few GPUs.
    """
    if workers.gpus * count > len(gpus):
        raise UserError(
            f"workers.gpus: {count} worker{'s' if count > 1 else ''} with {workers.gpus} each need "
            f"{workers.gpus * count} GPUs, and there are {len(gpus)} here; lower workers.count (--workers) or "
            "workers.gpus"
        )
    endless_cores, remaining_gpus = itertools.cycle(cores), iter(gpus)
    return [
        DeviceSlot(
            tuple(sorted(set(itertools.islice(endless_cores, workers.cores)))),
            tuple(itertools.islice(remaining_gpus, workers.gpus)),
        )
        for _ in range(count)
    ]


def available_devices(want_gpus: bool) -> tuple[list[int], list[str]]:
    """The cores that this process may use and, when wanted, the GPUs that it sees."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not want_gpus:
        return cores, []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return cores, [name for name in visible.split(",") if name]
    import torch

    return cores, [str(index) for index in range(torch.cuda.device_count())]


@dataclass
class _WorkerSlot:
    """One of the workers: its process, once it was started, and when it is to be started (again)."""

    devices: DeviceSlot
    start_at: float = 0.0  # time.monotonic()
    process: subprocess.Popen[bytes] | None = None  # while it runs
    log: Path = Path()
    deaths: int = 0  # in a row, without a trial that ended well meanwhile
    done_at_start: int = 0

    @property
    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace", encoding="utf-8")[-_LOG_TAIL:] if self.log.is_file() else ""


class WorkerPool:
    """The workers of one ``run``."""

    def __init__(self, study: Study, devices: Sequence[DeviceSlot]) -> None:
        self.study = study
        self._slots = [_WorkerSlot(slot) for slot in devices]
        self._logs = study.folder / "workers"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._signalled = False
        self.bad_input: str | None = None  # what a worker refused
        self.failed_worker_log: Path | None = None  # of a worker that was given up

    def run(self, done: Callable[[], int], tick: Callable[[], None]) -> None:
        """Keep the workers running until each has ended; after an error none is left.

        ``done`` counts the trials that have ended well; ``tick`` is called several times a second. After a signal, or
        once the study's stop flag is there, no worker is started again. SIGINT and SIGTERM end the workers after the
        running step, a second one ends them at once.
        """
        slots = self._slots
        with signal_handlers((signal.SIGINT, signal.SIGTERM), self._on_signal):
            try:
                while slots := [slot for slot in slots if self._supervise(slot, done)]:
                    tick()
                    time.sleep(_POLL_S)
            finally:
                self._kill()

    def _on_signal(self, *_: Any) -> None:
        if self._signalled:
            self._kill()
            return
        self._signalled = True
        say("\nstopping: running trials go back to the queue (again: at once)")
        self._terminate()

    def _supervise(self, slot: _WorkerSlot, done: Callable[[], int]) -> bool:
        """Start the worker once it is time to; after it has ended, decide whether it is started again: else False."""
        stopping = self._signalled or (self.study.folder / STOP).exists()
        if slot.process is None:
            if not stopping and time.monotonic() >= slot.start_at:
                self._start(slot, done())
            return not stopping
        code = slot.process.poll()
        if code is None:
            return True
        kill_tree(slot.process)  # what it may have left
        slot.process = None
        if code in (EXIT_OK, EXIT_PREEMPTED) or stopping:
            return False
        if code == EXIT_BAD_INPUT:
            self.bad_input = slot.tail.strip().rpartition("error: ")[2]
            self._terminate()
            return False
        slot.deaths = 1 if done() > slot.done_at_start else slot.deaths + 1
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if slot.deaths < _MAX_DEATHS:
            say(f"\na worker ended {cause} and is restarted; its log: {slot.log}")
            slot.start_at = time.monotonic() + _RESTART_S
            return True
        say(f"\na worker ended {cause}, again; it is not restarted. The end of its log, {slot.log}:\n{slot.tail}")
        self.failed_worker_log = slot.log
        return False

    def _start(self, slot: _WorkerSlot, done: int) -> None:
        slot.done_at_start = done
        host = socket.gethostname()
        unnamed = self._logs / f".starting-{host}-{os.getpid()}-{self._slots.index(slot)}"
        with open(unnamed, "wb") as log:
            slot.process = subprocess.Popen(
                worker_command(self.study.folder, len(slot.devices.gpus)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment(slot.devices),
                start_new_session=True,  # Ctrl-C at the terminal reaches only `run`, which signals its workers
                preexec_fn=_bind(slot.devices, os.getpid()),
            )
        slot.log = unnamed.rename(self._logs / f"{host}-{slot.process.pid}.log")

    def _terminate(self) -> None:
        """Send SIGTERM to every worker that runs."""
        for slot in self._slots:
            if slot.process is not None:
                slot.process.terminate()  # not one that has ended

    def _kill(self) -> None:
        """End every worker and its children at once."""
        for slot in self._slots:
            if slot.process is not None:
                kill_tree(slot.process)
                slot.process.wait()


def worker_command(folder: Path, gpus: int) -> list[str]:
    """The command line of a worker; with several GPUs one rank for each, through torchrun."""
    module = ["-m", "megadit.search.workers.worker", str(folder), *(plugin.name for plugin in loaded_plugins())]
    if gpus > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", *module]
    return [sys.executable, *module]


def worker_environment(devices: DeviceSlot, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a worker: its threads, its GPUs, and where this megadit is; nothing of a launcher's."""
    # A worker's process group is its own, even where `run` is a task of Slurm's.
    threads = str(max(1, len(devices.cores) // max(1, len(devices.gpus))))
    return child_environment(os.environ if env is None else env) | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": ",".join(devices.gpus),
    }


def _bind(devices: DeviceSlot, parent: int) -> Callable[[], None]:
    """What the forked process does before it becomes the worker: bind to its cores, and end with ``parent``."""
    libc = ctypes.CDLL(None)  # loaded before the fork

    def bind() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, devices.cores)
        set_parent_death_signal(libc=libc)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(1)

    return bind


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, its children (torchrun's have groups of their own) and what is left of its group."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
