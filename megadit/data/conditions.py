"""``Conditions``: what a run's model is conditioned on, from batches of its data."""

from __future__ import annotations

import torch

from megadit.conditioning import Conditioning, null_label
from megadit.config.model import ModelConfig
from megadit.data.batch import Batch


class Conditions:
    """Labels of a class-conditional model. ``null``: the condition, a batch of one, that stands for none."""

    def __init__(self, model: ModelConfig) -> None:
        self.null: Conditioning | None = null_label(model.num_classes)

    def of(self, batch: Batch, device: torch.device | str = "cpu") -> Conditioning:
        """The conditions of a batch, on ``device``."""
        if self.null is None:
            return Conditioning()
        return Conditioning(labels=batch.labels).to(device)
