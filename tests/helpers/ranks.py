"""Several ranks on this machine, for tests: forked ranks for speed, whole commands for realism.

``run_ranks`` forks the ranks from the test process, after torch and DeepSpeed were imported once, and joins them
over gloo: four ranks cost a few tenths of a second more than one. ``run_command`` starts a real command (a
launcher, a script) in a process group of its own. Neither leaves a process behind, not even after a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 2.0  # after the first failure, for the other ranks to print their errors and end
LOG_TAIL = 4000  # characters of a rank's output shown with its failure


class RankError(Exception):
    """A rank that ended without a result: killed, out of time, or with an error that cannot be pickled."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 200.0) -> list[Any]:
    """Call ``fn(*args)`` on ``world`` forked ranks of one gloo group and return the results in rank order.

    The group is up when ``fn`` starts (``torch.distributed.get_rank()`` tells which rank it is) and RANK, WORLD_SIZE,
    LOCAL_RANK and MASTER_* are set as a launcher would. Ranks see no GPU. A collective that waits longer than
    ``timeout`` seconds fails, groups made later included. The earliest failing rank's exception is raised here with
    its traceback and output as a note; the other ranks are killed.
    """
    _import_once()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _Ranks(world, Path(folder))
        port = free_port()
        try:
            for rank in range(world):
                setup = _RankSetup(rank, world, port, Path(folder), timeout)
                ranks.pids[rank] = _fork(functools.partial(_child, setup, fn, args))
            ranks.wait(timeout)
        finally:
            ranks.kill()
        return ranks.results()


def run_command(
    argv: Sequence[str], env: Mapping[str, str | None] | None = None, timeout: float = 200.0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process group, and kill what is left of the group when it ends or after ``timeout`` s.

    ``env`` is added to this process's environment; None removes a name. The environment's own commands (torchrun,
    deepspeed) come first in PATH, and the checkout is importable without being installed.
    """
    full = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    full["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [full.get("PYTHONPATH")])])
    for name, value in (env or {}).items():
        full.pop(name, None)
        if value is not None:
            full[name] = value
    # Files and not pipes: a forgotten grandchild that holds a pipe open would keep us waiting after the command ended.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            argv, env=full, cwd=cwd or ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process.pid)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if code is None:
        expired = subprocess.TimeoutExpired(list(argv), timeout, *texts)
        expired.add_note(f"stdout:\n{texts[0][-LOG_TAIL:]}\nstderr:\n{texts[1][-LOG_TAIL:]}")
        raise expired
    return subprocess.CompletedProcess(list(argv), code, *texts)


@functools.cache
def _import_once() -> None:
    """Import in the parent what every rank would otherwise import by itself (2 to 4 s each)."""
    import logging

    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.runtime.bf16_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

    # The C++ op that DeepSpeed's gloo start-up compiles serves inference only, and its build can hang on a stale lock.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # its first use imports torch._dynamo


def _fork(child: Callable[[], NoReturn]) -> int:
    """Fork, run ``child`` in the fork, and return its process number in the parent.

    What the parent left as garbage may own threads that the fork has not, and its destructor would wait for them for
    ever: so no collection happens between the fork and the freeze, and later ones leave frozen objects alone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    collecting = gc.isenabled()
    gc.disable()
    pid = os.fork()
    if pid == 0:
        gc.freeze()
    if collecting:
        gc.enable()
    if pid == 0:
        child()
    return pid


@dataclass(frozen=True)
class _RankSetup:
    rank: int
    world: int
    port: int
    folder: Path
    timeout: float


def _inherited_groups() -> list[Any]:
    """What this fork has of its parent's process groups, to be held: their destructors would wait for threads that the
    fork has not, as soon as a new engine takes DeepSpeed's or torch's last reference away.
    """
    references: list[Any] = []
    for name in ("deepspeed.utils.groups", "deepspeed.comm.comm", "torch.distributed.distributed_c10d"):
        module = sys.modules.get(name)
        for value in list(vars(module).values()) if module is not None else []:
            references.append(
                dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
            )
    world = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)
    references += [dict(value) for value in (getattr(world, "pg_map", {}), getattr(world, "pg_names", {}))]
    return references


def _child(setup: _RankSetup, fn: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    """All that a rank does after the fork; never returns into the test that forked it."""
    code = 1
    inherited = _inherited_groups()  # noqa: F841  (held until os._exit)
    try:
        _prepare_process(setup)
        _join_group(setup)
        outcome: tuple[Any, ...] = ("ok", fn(*args))
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException as error:
        outcome = ("error", time.monotonic(), error, traceback.format_exc())
    try:
        _write(setup.folder / f"result-{setup.rank}", outcome)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare_process(setup: _RankSetup) -> None:
    """Give the fork its own process group, output and environment, and let it end with the parent."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux only
    log = os.open(setup.folder / f"log-{setup.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]  # the parent's is no child of the fork
    faulthandler.enable(file=2)  # a crash prints its stack
    faulthandler.register(signal.SIGQUIT, file=2)  # and so does a rank that the parent finds out of time
    os.environ.update(
        RANK=str(setup.rank),
        LOCAL_RANK=str(setup.rank),
        WORLD_SIZE=str(setup.world),
        LOCAL_SIZE=str(setup.world),
        LOCAL_WORLD_SIZE=str(setup.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(setup.port),
        CUDA_VISIBLE_DEVICES="",
    )
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks for the address of the host's name


def _join_group(setup: _RankSetup) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None:
        comm.cdb = None  # of a run in the process that this one was forked from; ``_inherited_groups`` holds it
    limit = timedelta(seconds=setup.timeout)
    make_group = dist.new_group

    @functools.wraps(make_group)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        # Groups do not inherit the time limit of the first one; gloo's own is 30 minutes.
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = limit
        return make_group(*args, **kwargs)

    dist.new_group = new_group
    # A store of TCP asks name servers who 127.0.0.1 is. A silent one costs each rank some 20 s, and the store's thread
    # asks, too: a process forked at that moment would wait for ever for the C library's lock.
    store = dist.FileStore(str(setup.folder / "store"), setup.world)
    store.set_timeout(limit)
    dist.init_process_group("gloo", store=store, rank=setup.rank, world_size=setup.world, timeout=limit)
    dist.barrier()  # a rank whose work needs no other would leave while these still connect to it


def _write(path: Path, outcome: tuple[Any, ...]) -> None:
    """Pickle for our own parent only; an error that cannot be pickled travels as its text."""
    if outcome[0] == "error":
        kind, when, error, trace = outcome
        try:
            if type(pickle.loads(pickle.dumps(error))) is not type(error):
                raise TypeError("does not survive pickling")
        except Exception:
            outcome = (kind, when, RankError(f"{type(error).__name__}: {error}"), trace)
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(outcome))
    part.rename(path)


class _Ranks:
    """The parent's view of its ranks."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.pids: dict[int, int] = {}
        self.exits: dict[int, int] = {}  # rank -> exit status as subprocess gives it: negative for a signal
        self.limit: float | None = None  # the time limit in s, once it was reached
        self.stacks: dict[int, int] = {}  # rank -> where in its output (characters) the stack of a hang begins

    def wait(self, timeout: float) -> None:
        """Until all ended, the first one failed (and a grace period passed), or ``timeout`` s passed.

        An exception that ends the waiting, as of a test out of its own time, carries the stacks of the ranks alive.
        """
        try:
            failed = self._wait(timeout)
        except BaseException as error:
            self._request_stacks()
            for rank in self._alive():
                error.add_note(self._log(rank))
            raise
        if not failed and len(self.exits) < self.world:
            self.limit = timeout
            self._request_stacks()

    def _wait(self, timeout: float) -> bool:
        """Whether a rank failed."""
        end = time.monotonic() + timeout
        failed = False
        while len(self.exits) < self.world:
            self._reap(os.WNOHANG)
            if not failed and any(self.exits.values()):
                failed = True
                end = min(end, time.monotonic() + GRACE_S)
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        return failed

    def _request_stacks(self) -> None:
        for rank in self._alive():
            log = self.folder / f"log-{rank}"
            self.stacks[rank] = len(log.read_text(errors="replace")) if log.exists() else 0
            os.kill(self.pids[rank], signal.SIGQUIT)
        time.sleep(0.5)  # for the stacks to be written

    def kill(self) -> None:
        """Kill what lives, the ranks' own children included, and collect every exit status."""
        for rank, pid in self.pids.items():
            if rank not in self.exits:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _kill_group(pid)
        self._reap(0)

    def results(self) -> list[Any]:
        """The results, or the first failure as an exception."""
        outcomes = {}
        for rank in range(self.world):
            path = self.folder / f"result-{rank}"
            if path.exists():
                outcomes[rank] = pickle.loads(path.read_bytes())  # written by our own child
        errors = [(outcome[1], rank) for rank, outcome in outcomes.items() if outcome[0] == "error"]
        if errors:
            _, rank = min(errors)
            _, _, error, trace = outcomes[rank]
            error.add_note(f"on rank {rank} of {self.world}:\n{trace}\n{self._log(rank)}")
            raise error
        missing = [rank for rank in range(self.world) if rank not in outcomes]
        if missing:
            raise RankError(self._missing(missing))
        return [outcomes[rank][1] for rank in range(self.world)]

    def _alive(self) -> list[int]:
        return [rank for rank in self.pids if rank not in self.exits]

    def _reap(self, flags: int) -> None:
        for rank in self._alive():
            pid, status = os.waitpid(self.pids[rank], flags)
            if pid:
                self.exits[rank] = os.waitstatus_to_exitcode(status)

    def _missing(self, ranks: Sequence[int]) -> str:
        if self.limit is not None:
            first = f"no result from rank(s) {', '.join(map(str, ranks))} of {self.world} within {self.limit:g} s"
        else:
            codes = ", ".join(f"rank {rank}: exit status {self.exits.get(rank)}" for rank in ranks)
            first = f"of {self.world} ranks some ended without a result ({codes})"
        return "\n".join([first, *(self._log(rank) for rank in ranks)])

    def _log(self, rank: int) -> str:
        path = self.folder / f"log-{rank}"
        text = path.read_text(errors="replace") if path.exists() else ""
        # The stack of a rank out of time is shown whole: the place that hangs stands first in it.
        cut = min(self.stacks.get(rank, len(text)), max(len(text) - LOG_TAIL, 0))
        return f"output of rank {rank}:\n{text[cut:].strip() or '(none)'}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
