"""Checkpoints without a model: for tests of what else one holds, and of the folders that they lie in."""

import torch

from megadit.parallel import ProcessContext

ALONE = ProcessContext(0, 1, 0, torch.device("cpu"))


class NoPartitions:
    """A model of no parameters."""

    stage, replicated = 0, True

    def fragments_to_save(self):
        return []

    def adam_step(self):
        return 0

    def loss_scale_state(self):
        return {}
