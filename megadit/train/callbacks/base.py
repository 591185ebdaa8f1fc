"""``Callback``, the hooks of the loop. Progress, files, samples and checkpoints of a run are callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megadit.train.run import TrainingRun

Record = dict[str, Any]


class RunStopped(Exception):
    """Raised by a callback, on every rank alike, to end a run before its last step; nothing is saved for it.

    ``code`` and ``reason`` go into ``exit.json``.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Callback:
    """Hooks of the loop, called on every rank in the same order; each does nothing unless overridden."""

    def on_start(self, run: TrainingRun) -> None:
        """Before the first step (after a resume, if any)."""

    def on_step(self, run: TrainingRun) -> Record | None:
        """After every optimizer step; what it returns is added to the record of a logged step."""
        return None

    def on_log(self, run: TrainingRun, record: Record) -> None:
        """After a step that is logged, with its record."""

    def after_log(self, run: TrainingRun) -> None:
        """After every step and its log: for what must follow the metrics, such as a checkpoint."""

    def on_divergence(self, run: TrainingRun, record: Record) -> None:
        """After a step whose loss or gradients were not finite, with its record; the run ends, and nothing is saved."""

    def on_end(self, run: TrainingRun) -> None:
        """After the last step, whatever ended the loop short of an exception."""

    def close(self) -> None:
        """Release files and bars; called in every case."""


def due(step: int, every: int | None, total: int) -> bool:
    """Whether something done ``every`` steps and at the end is due after ``step`` of ``total`` steps."""
    return step == total or (every is not None and step % every == 0)
