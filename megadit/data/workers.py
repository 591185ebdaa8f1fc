"""Worker processes that are safe beside DeepSpeed: a fork server, shielded from the run's signals.

A fork of the training process copies locks that its threads (gloo, NCCL, OpenMP, TensorBoard) may hold
at that moment, and deadlocks; CUDA cannot be used after one at all. So workers are forked from a server
process that has only imported torch, and never from the training process.

Slurm and terminals send SIGUSR1, SIGTERM and SIGINT to every process of a job step. The run answers them
with a checkpoint, for which it still needs its workers: so these have them blocked, and end when the
stream is closed or their parent is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

_SHIELDED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
_PRELOAD = ["torch", "megadit.data.stream"]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the shielded signals in this thread: children inherit it, and none is lost (it waits until after)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_context() -> ForkServerContext:
    """The context to start workers from; its server is running and holds torch when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()  # first: it unblocks SIGINT and SIGTERM of this thread on its way out
    with _signals_blocked():
        forkserver.ensure_running()
    return context


def prepare_worker(worker_id: int) -> None:
    """DataLoader's ``worker_init_fn``: block the signals here too, and end when the training process is gone.

    DataLoader's own watch is on the parent process, here the fork server, which in turn lives as long
    as a worker does: without ours, both would outlive a training process that was killed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)  # should another part have started the server
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
