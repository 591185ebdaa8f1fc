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
    """What a worker hands over: images still uint8 (B, C, H, W), a quarter of the bytes of a ``Batch``."""

    images: Tensor
    labels: list[int]
    captions: list[str]
    numbers: list[int]
    extras: dict[str, Tensor]


class UnreadableSample(UserError):
    """What the set cannot give for the sample ``number``."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def read_samples(
    dataset: ImageSet, numbers: Sequence[int], indices: Sequence[int], *, seed: int, flip: bool
) -> RawBatch:
    """Read the images at ``indices``; the one with sample number s is mirrored if s's "flip" draw says so.

    Latents, and what else was made of the mirrored images, are read from ``dataset.mirrored`` instead.
    Raises ``UnreadableSample``.
    """
    views = [dataset] * len(indices)
    mirrored = batch_uniform(sample_keys(seed, "flip", numbers)) < 0.5 if flip else None
    if mirrored is not None and (copies := dataset.mirrored) is not None:
        views = [copies if turned else dataset for turned in mirrored.tolist()]
    read = [_read(view, i, number) for view, i, number in zip(views, indices, numbers, strict=True)]
    images = torch.stack([image for image, *_ in read])
    if mirrored is not None and not dataset.stores_latents:
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return RawBatch(
        images=images,
        labels=[label for _, label, _, _ in read],
        captions=[caption for _, _, caption, _ in read],
        numbers=list(numbers),
        extras={name: torch.stack([extra[name] for *_, extra in read]) for name in read[0][3]},
    )


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
