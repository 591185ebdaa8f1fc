"""Callbacks: the policies of a run, in the order in which the loop calls them. Importing this needs no torch."""

from megadit.extensions import CALLBACKS as REGISTRY
from megadit.train.callbacks.base import Callback, Record, RunStopped

# All of these run by default, in this order: validation adds to the record; a checkpoint follows the log, and pictures,
# which may fail, follow the checkpoint.
CALLBACKS = {
    "validation": "megadit.train.callbacks.artifacts:Validation",
    "progress": "megadit.train.callbacks.logging:ProgressBar",
    "json-lines": "megadit.train.callbacks.logging:JsonLines",
    "checkpoints": "megadit.train.callbacks.artifacts:Checkpoints",
    "samples": "megadit.train.callbacks.artifacts:Samples",
    "tensorboard": "megadit.train.callbacks.logging:TensorBoard",
    "wandb": "megadit.train.callbacks.logging:Wandb",
    "summary": "megadit.train.callbacks.artifacts:Summary",
}


def default_callbacks() -> list[Callback]:
    """One of each callback in CALLBACKS."""
    return make_callbacks(*CALLBACKS)


def make_callbacks(*names: str) -> list[Callback]:
    """One callback of each name. Raises UserError for an unknown name."""
    return [REGISTRY.get(name)() for name in names]


__all__ = ["CALLBACKS", "Callback", "Record", "RunStopped", "default_callbacks", "make_callbacks"]
