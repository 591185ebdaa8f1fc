"""Callbacks: the policies of a run, in the order in which the loop calls them."""

from megadit.train.callbacks.artifacts import Checkpoints, Samples, Summary, Validation
from megadit.train.callbacks.base import Callback, Record, RunStopped
from megadit.train.callbacks.logging import JsonLines, Progress, TensorBoard, Wandb


def default_callbacks() -> list[Callback]:
    """All of them. Validation adds to the record; a checkpoint follows the log, and pictures, which may fail, that."""
    return [Validation(), Progress(), JsonLines(), Checkpoints(), Samples(), TensorBoard(), Wandb(), Summary()]


__all__ = [
    "Callback",
    "Checkpoints",
    "JsonLines",
    "Record",
    "RunStopped",
    "Samples",
    "Summary",
    "TensorBoard",
    "Validation",
    "default_callbacks",
]
