"""Callbacks: the policies of a run, in the order in which the loop calls them."""

from megadit.train.callbacks.artifacts import Checkpoints, Samples, Summary, Validation
from megadit.train.callbacks.base import Callback, Record
from megadit.train.callbacks.logging import JsonLines, Progress, TensorBoard, Wandb


def default_callbacks() -> list[Callback]:
    """All of them. Validation adds to the record, so it comes before the log; a checkpoint comes last."""
    return [Validation(), Samples(), Progress(), JsonLines(), TensorBoard(), Wandb(), Checkpoints(), Summary()]


__all__ = ["Callback", "Record", "default_callbacks"]
