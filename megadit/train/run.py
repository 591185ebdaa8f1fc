"""``TrainingRun``: the parts of one run, assembled once and handed to the loop and its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.checkpoint.format import Position
from megadit.checkpoint.write import save_checkpoint
from megadit.conditioning import Conditioning
from megadit.config import RunConfig
from megadit.data import Batch, BatchLayout, ImageSet
from megadit.data.codecs.codec import Codec
from megadit.data.conditions import Conditions
from megadit.data.features import TargetFeatures
from megadit.data.windows import before
from megadit.diffusion import LossTerms, NoisyBatch, Objective
from megadit.diffusion.repa import alignment_loss, with_alignment
from megadit.engine.engine import TrainingEngine
from megadit.parallel import ProcessContext
from megadit.rng import sample_keys
from megadit.train.divergence import TrainingDiverged
from megadit.train.resume import DataRecord
from megadit.train.run_dir import RunDirectory


@dataclass
class TrainingRun:
    """One run. ``position`` and ``saved_step`` (of the newest checkpoint made here) advance; everything else stays.

    ``features`` are the targets of the REPA loss; None where there is none, or where this rank computes no losses.
    ``data`` is what checkpoints keep of what the run is trained on; None: nothing.
    """

    config: RunConfig
    context: ProcessContext
    engine: TrainingEngine
    objective: Objective
    codec: Codec
    conditions: Conditions
    train_set: ImageSet
    val_set: ImageSet
    layout: BatchLayout
    directory: RunDirectory
    total_steps: int
    position: Position
    features: TargetFeatures | None = None
    data: DataRecord | None = None
    saved_step: int | None = None

    def inputs(self, batch: Batch, seed: int) -> tuple[Tensor, Conditioning]:
        """Move a batch to this rank's device: model-space images (B, C, H, W) and their conditions.

        ``seed`` keys the draw from a VAE's posterior, per sample number.
        """
        device = self.context.device
        keys = sample_keys(seed, "latent", batch.numbers).to(device)
        x0 = self.codec.encode(batch.images.to(device, non_blocking=True), keys)
        return x0, self.conditions.of(batch, device)

    def losses(self, forward: Callable[..., Any], batch: Batch, noisy: NoisyBatch) -> LossTerms:
        """What training minimises on a batch: the objective's loss and, where the run has one, REPA's.

        ``forward`` is the model, ``noisy`` was made from ``batch``.
        """
        if self.features is None:
            return self.objective.loss(forward(noisy.x, noisy.t, noisy.cond), noisy)
        output, projected = forward(noisy.x, noisy.t, noisy.cond, project=True)
        terms = self.objective.loss(output, noisy)
        return with_alignment(terms, projected, self.features.of(batch), self.config.objective.repa_weight)

    def separate_losses(self, model: Callable[..., Any], batch: Batch, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Per-sample losses, each float32 (B,): ``loss``, the objective's alone, and ``repa``, without its weight.

        So that runs can be compared whatever their ``objective.repa_weight``.
        """
        if self.features is None:
            return {"loss": self.objective.loss(model(noisy.x, noisy.t, noisy.cond), noisy).total}
        output, projected = model(noisy.x, noisy.t, noisy.cond, project=True)
        repa = alignment_loss(projected, self.features.of(batch))
        return {"loss": self.objective.loss(output, noisy).total, "repa": repa}

    def save(self) -> Path:
        """Write a checkpoint of the present position (all ranks must call).

        Raises:
            OwnershipLost: another process has taken the run directory over.
            TrainingDiverged: a weight, moment or average is not finite, which a finite update of a huge learning rate
                can make of it.
            UserError: the disk does not take it.
        """
        found = self.engine.partitions.not_finite([self.engine.ema.tensors])
        names = sorted({name for names in self.context.gather_objects(found) for name in names})
        if names:
            raise TrainingDiverged(
                f"step {self.position.step} cannot be saved: values of {len(names)} parameters are not finite, of "
                f"{names[0]} among them; earlier checkpoints stay"
            )
        if self.context.is_main:
            self.directory.flush_metrics()  # after a crash there is a row for every step that the checkpoint holds
        upto = self.layout.next_number(self.position.step)
        samples = {"next": upto, "left_out": [list(window) for window in before(self.layout.left_out, upto)]}
        path = save_checkpoint(
            self.directory.path,
            self.engine.partitions,
            self.config,
            self.position,
            self.engine.optimizer.table,
            self.context,
            [self.engine.ema],
            self.directory.ownership,
            {**({} if self.data is None else self.data.state()), "samples": samples},
        )
        self.saved_step = self.position.step
        return path
