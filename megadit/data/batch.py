"""A batch, from global sample numbers: read, mirrored where its number says so, scaled to [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadit.data.dataset import ImageSet
from megadit.data.order import SampleOrder
from megadit.errors import UserError
from megadit.rng import batch_uniform, sample_keys


@dataclass(frozen=True, eq=False)
class Batch:
    """images float32 (B, C, H, W) in [-1, 1], or latents; labels int64 (B,); captions, B of them; numbers int64 (B,).

    extras: what the set stores beside its images (text, text_mask, pooled, features), stacked.
    """

    images: Tensor
    labels: Tensor
    captions: list[str]
    numbers: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.numbers.shape[0])


@dataclass(frozen=True, eq=False)
class RawBatch:
    """A batch as a worker returns it: images still uint8 (B, C, H, W), a quarter of the bytes of a ``Batch``."""

    images: Tensor
    labels: list[int]
    captions: list[str]
    numbers: list[int]
    extras: dict[str, Tensor]


class UnreadableSample(UserError):
    """The image of the sample ``number`` cannot be read."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def read_samples(
    dataset: ImageSet, numbers: Sequence[int], indices: Sequence[int], *, seed: int, flip: bool
) -> RawBatch:
    """Read the images at ``indices``; the one with sample number s is mirrored if s's "flip" draw says so.

    Latents and features of the mirrored image, where they are stored, are read from ``dataset.mirrored``.
    Raises ``UnreadableSample``.
    """
    views = [dataset] * len(indices)
    flips = batch_uniform(sample_keys(seed, "flip", numbers)) < 0.5 if flip else None
    if flips is not None and (mirrored := dataset.mirrored) is not None:
        views = [mirrored if flipped else dataset for flipped in flips.tolist()]
    samples = [_read(view, i, number) for view, i, number in zip(views, indices, numbers, strict=True)]
    images, labels, captions, extras = map(list, zip(*samples, strict=True))
    stacked = torch.stack(images)
    if flips is not None and not dataset.stores_latents:
        stacked = torch.where(flips[:, None, None, None], stacked.flip(-1), stacked)
    by_name = {name: torch.stack([extra[name] for extra in extras]) for name in extras[0]}
    return RawBatch(stacked, labels, captions, list(numbers), by_name)


def _read(view: ImageSet, i: int, number: int) -> tuple[Tensor, int, str, dict[str, Tensor]]:
    try:
        return view.image(i), view.label(i), view.caption(i), view.extras(i)
    except UserError as error:
        raise UnreadableSample(str(error), number) from error


def scale_images(images: Tensor) -> Tensor:
    """uint8 0...255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def finish(raw: RawBatch) -> Batch:
    """The ``Batch`` of a ``RawBatch``."""
    return Batch(
        images=raw.images.float() if raw.images.is_floating_point() else scale_images(raw.images),
        labels=torch.tensor(raw.labels, dtype=torch.int64),
        captions=raw.captions,
        numbers=torch.tensor(raw.numbers, dtype=torch.int64),
        extras=raw.extras,
    )


def make_batch(dataset: ImageSet, order: SampleOrder, numbers: Sequence[int], *, seed: int, flip: bool) -> Batch:
    """The batch of these global sample numbers. Raises ``UserError`` when an image cannot be read."""
    return finish(read_samples(dataset, numbers, order.indices(numbers), seed=seed, flip=flip))
