"""Being asked to stop: SIGUSR1, SIGTERM or SIGINT becomes a checkpoint and exit code 85, agreed by all ranks.

Before the training begins there is nothing to save, and the answer is to end, with the same code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megadit.errors import EXIT_FAILURE, EXIT_PREEMPTED
from megadit.parallel.failure_messages import peer_wrote_torchelastic_error

REPEAT_WINDOW_S = 5.0  # a second SIGTERM within it is the same request, which launchers and Slurm may both pass on
KEYBOARD_REPEAT_WINDOW_S = 0.5  # a second Ctrl-C after it is a person's
_STARTUP_TIMEOUT_S = 10.0  # for a start that hears no signal since it waits in another library's code

Phase = Literal["starting", "training", "ending"]


class PreemptedAtStart(BaseException):
    """A signal asked for the end before the training began; no Exception, since none may take it for its own.

    ``number`` is the signal's, and ``began`` when the process began to answer (``time.time()``).
    """

    def __init__(self, number: int, began: float) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.began = number, began


class StopRequest:
    """Whether a signal asked for the run's end, and the answer to it: a handler for ``signal.signal``.

    While starting it raises ``PreemptedAtStart``; while training it is noted, and the loop looks at ``received``.
    """

    def __init__(self, phase: Phase = "training") -> None:
        self.received = False
        self.phase: Phase = phase
        self.began = time.time()

    def __call__(self, number: int, frame: Any = None) -> None:
        """Answer one signal (in the main thread)."""
        first, self.received = not self.received, True
        if self.phase == "starting":
            self.phase = "ending"
            raise PreemptedAtStart(number, self.began)
        if first and self.phase == "training" and os.environ.get("RANK", "0") == "0":
            again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
            _say(f"{signal.Signals(number).name} noted: saving at the next step{again}")


@contextmanager
def preemption_signals(phase: Phase = "training") -> Iterator[StopRequest]:
    """Answer SIGUSR1, which Slurm sends ahead of a preemption (``--signal=USR1@…``), SIGTERM and SIGINT in the block.

    The latter two only where nobody in this process has taken them before (a study's worker has). A later second one
    ends the process at once, as it would have by default: for a run that cannot reach its next step. Within a block
    that was entered while starting, the training goes on with its ``StopRequest``.
    """
    outer = signal.getsignal(signal.SIGUSR1)
    if isinstance(outer, StopRequest):
        outer.phase = phase
        try:
            yield outer
        finally:
            outer.phase = "ending"
        return
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest(phase)  # only the main thread may take signals
        return
    state = StopRequest(phase)
    taken = [signal.SIGUSR1]
    taken += [signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else []
    taken += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    with _second_ends(state, frozenset(taken) - {signal.SIGUSR1}):
        before = {number: signal.signal(number, state) for number in taken}
        try:
            yield state
        finally:
            state.phase = "ending"
            for number, handler in before.items():
                signal.signal(number, handler)


def stop_handling_signals() -> None:
    """From here on others answer the signals in this process: whoever waited for them while starting does no more."""
    outer = signal.getsignal(signal.SIGUSR1)
    if isinstance(outer, StopRequest):
        outer.phase = "ending"


@contextmanager
def _second_ends(state: StopRequest, numbers: frozenset[int]) -> Iterator[None]:
    """Watch for a second signal in a thread: the main one may wait where Python hears none, as in a collective."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(ear, state, numbers), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(mouth)
        thread.join()
        os.close(ear)


def _watch(ear: int, state: StopRequest, numbers: frozenset[int]) -> None:
    first: tuple[int, float] | None = None
    while True:
        waits = first is not None and state.phase == "starting"
        if not select.select([ear], [], [], _STARTUP_TIMEOUT_S if waits else None)[0]:
            if state.phase == "starting":
                os.write(2, b"preempted before the first step, in a wait that hears no signal: ends at once\n")
                os._exit(EXIT_PREEMPTED)
            continue
        heard = os.read(ear, 1)
        if not heard:
            return
        number, now = heard[0], time.monotonic()
        if first is None:
            first = (number, now)
        elif number in numbers:
            by_hand = number == first[0] == signal.SIGINT
            if now - first[1] > (KEYBOARD_REPEAT_WINDOW_S if by_hand else REPEAT_WINDOW_S):
                ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; Python lets only the main thread set it
                os.kill(os.getpid(), number)


def end_before_training(folder: Path, asked: PreemptedAtStart) -> int:
    """Say and record, on rank 0, that the run was asked to end before its first step; returns exit code 85.

    A launcher also ends ranks by SIGTERM because another one failed: where that is to be seen, it is a failure.
    """
    from megadit.checkpoint.names import saved_step
    from megadit.train.run_dir import RunDirectory

    directory, alone = RunDirectory(folder), os.environ.get("WORLD_SIZE", "1") == "1"
    unclear = asked.number == signal.SIGTERM and not alone
    if unclear and (peer_wrote_torchelastic_error() or directory.recorded_since(asked.began)):
        _say(f"[rank {os.environ['RANK']}] another rank has ended, and so this one does: see its error")
        return EXIT_FAILURE
    if os.environ.get("RANK", "0") == "0":
        _say("preempted before the first step: nothing to save; start the same command again")
        directory.write_preempted(saved_step(folder), make=not unclear)
    return EXIT_PREEMPTED


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
        os.write(2, f"\n{text}\n".encode())
