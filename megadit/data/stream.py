"""``BatchStream``: the endless sequence of a rank's micro batches, read here or ahead of time by worker processes.

The main process resolves sample numbers to indices and sends both to the workers, which only read,
decode and mirror. So the batches are the same, in the same order, for any number of workers.

Workers are safe beside DeepSpeed. A fork of the training process copies locks that its threads (gloo, NCCL, OpenMP,
TensorBoard) may hold at that moment, and deadlocks; CUDA cannot be used after one at all. So workers are forked from a
server process that has only imported torch, and never from the training process.

Slurm and terminals send SIGUSR1, SIGTERM and SIGINT to every process of a job step. The run answers them
with a checkpoint, for which it still needs its workers: so these have them blocked, and end when the
stream is closed or their parent is gone.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megadit.config.schema.data import OnCorrupt
from megadit.data.batch import Batch, RawBatch, UnreadableSample, finish, read_samples
from megadit.data.dataset import ImageSet
from megadit.data.order import BatchLayout, SampleOrder
from megadit.errors import UserError


@dataclass(frozen=True)
class _Failure:
    """An ``UnreadableSample`` as a worker returns it: DataLoader would bury an exception's message in a traceback."""

    message: str
    sample: int


class _Reader(Dataset):
    """The reader, in a worker or here: a list of (sample number, index) pairs -> ``RawBatch`` or ``_Failure``."""

    def __init__(self, dataset: ImageSet, seed: int, flip: bool) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> RawBatch | _Failure:
        numbers, indices = zip(*pairs, strict=True)
        try:
            return read_samples(self.dataset, numbers, indices, seed=self.seed, flip=self.flip)
        except UnreadableSample as error:
            return _Failure(str(error), error.number)


class _BatchSampler:
    """DataLoader's batch sampler: the pairs of each micro batch from ``start_step`` on, without end."""

    def __init__(self, layout: BatchLayout, order: SampleOrder, start_step: int) -> None:
        self.layout, self.order, self.start_step = layout, order, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            for micro in range(self.layout.accumulation):
                numbers = self.layout.numbers(step, micro)
                yield list(zip(numbers, self.order.indices(numbers), strict=True))
            step += 1


def _as_is(item: Any) -> Any:
    return item


class BatchStream(Iterator[Batch], AbstractContextManager["BatchStream"]):
    """Micro batches of one rank in order, forever: step ``start_step`` micro 0, micro 1, ..., next step.

    ``workers`` processes read ahead (0: images are read when asked for); the batches do not depend on it.
    ``step`` and ``micro`` are those of the next batch. Close it, or use it in ``with``. When an image cannot be read,
    here or in a worker, ``next`` raises ``UserError`` with the sample and the step, and closes the stream: the only
    value of ``on_corrupt`` is stop.
    """

    def __init__(
        self,
        dataset: ImageSet,
        layout: BatchLayout,
        seed: int,
        flip: bool,
        workers: int,
        start_step: int = 0,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        self.layout, self.order = layout, SampleOrder(len(dataset), seed)
        self.step, self.micro, self.on_corrupt = start_step, 0, on_corrupt
        self._closed = False
        self._reader = _Reader(dataset, seed, flip)
        self._prefetcher: Any = None
        self._processes: list[Any] = []
        self._at_exit: Callable[[], None] | None = None
        if workers > 0:
            self._start(workers)

    @property
    def epoch(self) -> int:
        """The epoch (0-based) in which the next batch begins."""
        return self.order.epoch(self.layout.numbers(self.step, self.micro)[0])

    def _start(self, workers: int) -> None:
        loader = DataLoader(
            self._reader,
            batch_sampler=_BatchSampler(self.layout, self.order, self.step),
            collate_fn=_as_is,
            num_workers=workers,
            multiprocessing_context=worker_context(),
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # else DataLoader draws its base seed from torch's global generator
        )
        self._prefetcher = iter(loader)
        self._processes = list(getattr(self._prefetcher, "_workers", ()))
        # Without this an exit would wait for the workers, which do not hear SIGTERM, and they for the exit.
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this BatchStream is closed")
        raw = self._read() if self._prefetcher is None else next(self._prefetcher)
        if isinstance(raw, _Failure):
            self.close()
            raise UserError(
                f"{raw.message} (sample {raw.sample}, for step {self.step + 1}; data.on_corrupt is {self.on_corrupt})"
            )
        self.micro += 1
        if self.micro == self.layout.accumulation:
            self.step, self.micro = self.step + 1, 0
        return finish(raw)

    def _read(self) -> RawBatch | _Failure:
        numbers = self.layout.numbers(self.step, self.micro)
        return self._reader.__getitems__(list(zip(numbers, self.order.indices(numbers), strict=True)))

    def close(self) -> None:
        """Stop the workers. Idempotent."""
        self._closed = True
        self._prefetcher = None  # the last reference: DataLoader tells its workers to end, and waits for them
        processes, self._processes = self._processes, []
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


def _close_at_exit(reference: weakref.ref[BatchStream]) -> None:
    stream = reference()
    if stream is not None:
        stream.close()


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
