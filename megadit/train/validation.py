"""A fixed-noise validation loss: the same images, noise and times at every evaluation of every run.

Only the model changes from one evaluation to the next, so small differences are visible, and runs of different seeds,
widths and layouts can be compared. Times are stratified over the schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megadit.config.schema.run import ONLINE
from megadit.data import SampleOrder, make_batch
from megadit.rng import batch_normal, sample_keys

if TYPE_CHECKING:
    from megadit.data import Batch
    from megadit.diffusion import NoisyBatch
    from megadit.train.run import TrainingRun

_SEED = 20240521  # fixed for all runs: the loss must not depend on train.seed
_STRATA = 64


def validation_losses(run: TrainingRun, weights: str = ONLINE) -> dict[str, float]:
    """Mean losses over the first ``train.validation_images`` held-out images; none when there are no images.

    ``loss`` is the objective's alone, ``repa`` that of REPA where the run has one.
    weights: online, or the name of an average.
    All ranks must call: images are divided among data-parallel ranks, and each rank makes the same number of forward
    passes (ZeRO-3 gathers parameters in them); surplus images have weight zero.
    """
    count = min(run.config.train.validation_images, len(run.val_set))
    if count == 0:
        return {}
    world, rank, size = run.layout.ranks, run.layout.rank, run.layout.micro_batch
    passes = -(-count // (world * size))
    names = ["loss", "repa"] if run.engine.loss.needs_projection else ["loss"]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=run.context.device)
    # epoch 0 of this order is a fixed shuffle, so that the first images are a fair sample of all classes
    order = SampleOrder(len(run.val_set), _SEED)
    with run.engine.evaluation(weights):
        for index in range(passes):
            first = (index * world + rank) * size
            if not run.engine.reads_data:  # a middle stage of a pipeline only passes activations on
                run.engine.evaluate_batch()
                continue
            numbers = [n if n < count else count - 1 for n in range(first, first + size)]
            losses = run.engine.evaluate_batch(*_sample(run, order, numbers))
            if losses:
                counted = torch.tensor([float(n < count) for n in range(first, first + size)]).to(sums)
                sums += torch.stack([*((losses[name] * counted).sum() for name in names), counted.sum()])
    *totals, images = run.context.sum(sums).tolist()
    return {name: total / images for name, total in zip(names, totals, strict=True)}


def _sample(run: TrainingRun, order: SampleOrder, numbers: list[int]) -> tuple[Batch, NoisyBatch]:
    """The held-out images of these numbers with their noise, at times that follow from the numbers."""
    batch = make_batch(run.val_set, order, numbers, seed=_SEED, flip=False)
    loss = run.engine.loss
    x0, cond = loss.inputs(batch, _SEED)
    strata = torch.tensor([(n * 37 % _STRATA + 0.5) / _STRATA for n in numbers])  # 37 is coprime to 64
    keys = sample_keys(_SEED, "validation-noise", numbers).to(x0.device)
    noise = batch_normal(keys, x0.shape[1:])
    return batch, loss.objective.prepare(x0, cond, numbers, _SEED, t01=strata, noise=noise, drop=False)
