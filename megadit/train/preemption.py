"""Being asked to stop: SIGUSR1 or SIGTERM becomes a checkpoint and exit code 85, agreed by all ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INSIST_S = 5.0  # a second SIGTERM within it is the same request, which launchers and Slurm may both pass on


@dataclass
class Interrupt:
    """Whether a signal asked for the run's end, and when (``time.monotonic()``)."""

    raised: bool = False
    since: float = 0.0


@contextmanager
def preemption_signals() -> Iterator[Interrupt]:
    """Note SIGUSR1, which Slurm sends ahead of a preemption (``--signal=USR1@…``), and SIGTERM in the block.

    SIGTERM only where nobody in this process has taken it before (a study's worker has). A later second one ends the
    process at once, as it would have by default: for a run that cannot reach its next step.
    """
    state = Interrupt()

    def note(number: int, *_: Any) -> None:
        if number == signal.SIGTERM and state.raised and time.monotonic() - state.since > INSIST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not state.raised:
            state.raised, state.since = True, time.monotonic()

    taken = [signal.SIGUSR1]
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        taken.append(signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in taken}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
