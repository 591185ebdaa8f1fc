"""Preemption: SIGUSR1, SIGTERM or SIGINT becomes a checkpoint and exit code 85, agreed by all ranks.

A signal before the first step ends the process with the same code; there is nothing to save.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megadit.errors import EXIT_FAILURE, EXIT_PREEMPTED
from megadit.parallel.failure_messages import peer_wrote_torchelastic_error

REPEAT_WINDOW_S = 5.0  # a second SIGTERM within it is the same request: launchers and Slurm may both forward it
KEYBOARD_REPEAT_WINDOW_S = 0.5  # a second Ctrl-C after it is a second key press
_STARTUP_TIMEOUT_S = 10.0  # from a signal to the end of a start-up that is blocked in another library's code

Phase = Literal["starting", "training", "ending"]


class PreemptedAtStart(BaseException):
    """A signal came before the training began. A BaseException, so that no ``except Exception`` swallows it.

    ``number`` is the signal's, and ``began`` when the process began to handle signals (``time.time()``).
    """

    def __init__(self, number: int, began: float) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.began = number, began


class StopRequest:
    """A signal handler, and whether it was called (``received``).

    In the phase "starting" it raises ``PreemptedAtStart``; in "training" the loop polls ``received``; in "ending" it is
    ignored.
    """

    def __init__(self, phase: Phase = "training") -> None:
        self.received = False
        self.phase: Phase = phase
        self.began = time.time()

    def __call__(self, number: int, frame: Any = None) -> None:
        """Handle one signal (in the main thread)."""
        first, self.received = not self.received, True
        if self.phase == "starting":
            self.phase = "ending"
            raise PreemptedAtStart(number, self.began)
        if first and self.phase == "training" and os.environ.get("RANK", "0") == "0":
            again = "; press Ctrl-C again to exit at once" if number == signal.SIGINT else ""
            _write_stderr(f"{signal.Signals(number).name} received: saving after this step{again}")


@contextmanager
def preemption_signals(phase: Phase = "training") -> Iterator[StopRequest]:
    """Handle SIGUSR1, which Slurm sends ahead of a preemption (``--signal=USR1@…``), SIGTERM and SIGINT in the block.

    The latter two only where they have no handler yet (a study's worker has its own). A second one ends the process at
    once, as it would by default: for a run that cannot reach its next step. Inside a block entered in the phase
    "starting", the same ``StopRequest`` is used again.
    """
    outer_request = signal.getsignal(signal.SIGUSR1)
    if isinstance(outer_request, StopRequest):
        outer_request.phase = phase
        try:
            yield outer_request
        finally:
            outer_request.phase = "ending"
        return
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest(phase)  # only the main thread may take signals
        return
    request = StopRequest(phase)
    handled = [signal.SIGUSR1]
    handled += [signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else []
    handled += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    with _exit_on_second_signal(request, frozenset(handled) - {signal.SIGUSR1}), signal_handlers(handled, request):
        try:
            yield request
        finally:
            request.phase = "ending"


@contextmanager
def signal_handlers(numbers: Iterable[int], handler: Callable[..., None]) -> Iterator[None]:
    """Handle signals by ``handler(number, frame)`` in the block, and as before after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_handling_signals() -> None:
    """Ignore signals in the enclosing ``preemption_signals`` block from here on: the caller has handlers of its own."""
    outer_request = signal.getsignal(signal.SIGUSR1)
    if isinstance(outer_request, StopRequest):
        outer_request.phase = "ending"


@contextmanager
def _exit_on_second_signal(request: StopRequest, numbers: frozenset[int]) -> Iterator[None]:
    """Watch for a second signal in a thread: the main one may be blocked where no handler runs, as in a collective."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch_signals, args=(read_fd, request, numbers), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_fd)
        thread.join()
        os.close(read_fd)


def _watch_signals(read_fd: int, request: StopRequest, numbers: frozenset[int]) -> None:
    first: tuple[int, float] | None = None
    while True:
        blocked = first is not None and request.phase == "starting"
        if not select.select([read_fd], [], [], _STARTUP_TIMEOUT_S if blocked else None)[0]:
            if request.phase == "starting":
                os.write(2, b"preempted before the first step, in a call that cannot be interrupted: exiting\n")
                os._exit(EXIT_PREEMPTED)
            continue
        data = os.read(read_fd, 1)
        if not data:
            return
        number, now = data[0], time.monotonic()
        if first is None:
            first = (number, now)
        elif number in numbers:
            by_hand = number == first[0] == signal.SIGINT
            if now - first[1] > (KEYBOARD_REPEAT_WINDOW_S if by_hand else REPEAT_WINDOW_S):
                ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; Python lets only the main thread set it
                os.kill(os.getpid(), number)


def exit_before_training(folder: Path, preempted: PreemptedAtStart) -> int:
    """Report and record, on rank 0, that a signal ended the run before its first step; returns exit code 85.

    A launcher also ends ranks by SIGTERM because another one failed: where that is visible, it returns 1.
    """
    from megadit.checkpoint.names import saved_step
    from megadit.train.run_dir import RunDirectory

    directory, single_rank = RunDirectory(folder), os.environ.get("WORLD_SIZE", "1") == "1"
    ambiguous = preempted.number == signal.SIGTERM and not single_rank
    if ambiguous and (peer_wrote_torchelastic_error() or directory.recorded_since(preempted.began)):
        _write_stderr(f"[rank {os.environ['RANK']}] another rank has ended, and so this one does: see its error")
        return EXIT_FAILURE
    if os.environ.get("RANK", "0") == "0":
        _write_stderr("preempted before the first step: nothing to save; start the same command again")
        directory.write_preempted(saved_step(folder), make=not ambiguous)
    return EXIT_PREEMPTED


def _write_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
        os.write(2, f"\n{text}\n".encode())
