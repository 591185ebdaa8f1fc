"""Checkpoints: named fragments of master weights and optimizer state that any layout reads. See docs/checkpoints.md.

======================  ============================================================
checkpoint_names        where they lie, told by names alone
checkpoint_format       the index, checksums
checkpoint_write        ``save_checkpoint``: all ranks write, nothing torn is ever final
checkpoint_read         ``StoredCheckpoint``: checks, restoring, plain models
checkpoint_find         the newest sound one of a run
checkpoint_inspect      summary, verification and comparison for people
fragment_io, slices     the files, and which elements are where
======================  ============================================================
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from megadit.checkpoint.find import find_checkpoint, open_checkpoint
from megadit.checkpoint.format import FORMAT, VERSION, WEIGHTS, Position, StateSource
from megadit.checkpoint.io import BrokenCheckpoint
from megadit.checkpoint.names import checkpoint_root, has_checkpoints, run_config, saved_step
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.write import save_checkpoint
from megadit.config import RunConfig
from megadit.config.schema.run import ONLINE
from megadit.errors import UserError

__all__ = [
    "FORMAT",
    "VERSION",
    "WEIGHTS",
    "BrokenCheckpoint",
    "Position",
    "StateSource",
    "StoredCheckpoint",
    "checkpoint_root",
    "find_checkpoint",
    "has_checkpoints",
    "load_model",
    "open_checkpoint",
    "save_checkpoint",
    "saved_step",
]


def load_model(
    run_dir: str | Path, checkpoint: str = "latest", weights: str | None = ONLINE
) -> tuple[RunConfig, nn.Module]:
    """The config and the float32 model (on the CPU, eval mode) of a run directory's checkpoint.

    weights: online, or the name of a moving average; None: what the run's ``sample.weights`` names.

    Raises:
        UserError: no run there, no checkpoint yet, a broken one or one of another model or without these weights.
    """
    from megadit.models import build_model

    run_dir = Path(run_dir)
    config = run_config(run_dir)
    found = open_checkpoint(run_dir, checkpoint, "--checkpoint")
    if found is None:
        raise UserError(f"'{run_dir}' has no checkpoint yet; wait for train.checkpoint_every or the run's end")
    model = build_model(config.model)
    found.stored.load_weights(model, config.sample.weights if weights is None else weights)
    return config, model.eval()
