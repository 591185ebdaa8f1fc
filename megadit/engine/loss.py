"""The training loss of a batch: the objective's and, where a run has one, that of REPA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.data import Batch
from megadit.data.codecs.codec import Codec
from megadit.data.conditions import Conditions
from megadit.data.features.targets import TargetFeatures
from megadit.diffusion import LossTerms, NoisyBatch, Objective
from megadit.diffusion.objectives.repa import alignment_loss, with_alignment
from megadit.rng import sample_keys


@dataclass(frozen=True)
class BatchLosses:
    """Losses of one micro batch, detached.

    numbers: global sample numbers, int64 (B,).  terms: per-sample losses.  time01: positions in [0, 1], float32 (B,).
    """

    numbers: Tensor
    terms: LossTerms
    time01: Tensor


@dataclass(frozen=True)
class TrainingLoss:
    """Makes the model's input from a batch, and the loss from the model's output.

    seed: of noise, times and dropped conditions.  features: targets of the REPA loss; None without REPA, and on a rank
    that computes no losses.
    """

    objective: Objective
    codec: Codec
    conditions: Conditions
    seed: int
    device: torch.device
    features: TargetFeatures | None = None
    repa_weight: float = 0.0

    @property
    def needs_projection(self) -> bool:
        """Whether the loss needs the REPA projection beside the model's output."""
        return self.repa_weight > 0

    def inputs(self, batch: Batch, seed: int) -> tuple[Tensor, Conditioning]:
        """A batch on this rank's device: model-space images, float32 (B, C, H, W), and their conditions.

        ``seed`` keys the draw from a VAE's posterior, per sample number.
        """
        keys = sample_keys(seed, "latent", batch.numbers).to(self.device)
        x0 = self.codec.encode(batch.images.to(self.device, non_blocking=True), keys)
        return x0, self.conditions.of(batch, self.device)

    def prepare(self, batch: Batch) -> NoisyBatch:
        """A batch of the training set with its noise."""
        x0, cond = self.inputs(batch, self.seed)
        return self.objective.prepare(x0, cond, batch.numbers, self.seed)

    def compute(self, outputs: Any, batch: Batch, noisy: NoisyBatch) -> LossTerms:
        """The loss that training minimises, from the model's ``outputs`` for ``noisy``, which was made from ``batch``.

        outputs: float (B, C or 2C, H, W); a pair of it and the projected tokens (B, T, F) if ``needs_projection``.
        """
        if self.features is None:
            return self.objective.loss(outputs, noisy)
        output, projected = outputs
        return with_alignment(self.objective.loss(output, noisy), projected, self.features.of(batch), self.repa_weight)

    def per_sample(self, outputs: Any, batch: Batch, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Per-sample losses, each float32 (B,): ``loss``, the objective's alone, and ``repa``, without its weight.

        Separate, so that runs with different ``objective.repa_weight`` are comparable.
        """
        if self.features is None:
            return {"loss": self.objective.loss(outputs, noisy).total}
        output, projected = outputs
        repa = alignment_loss(projected, self.features.of(batch))
        return {"loss": self.objective.loss(output, noisy).total, "repa": repa}
