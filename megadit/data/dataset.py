"""What a set of images is: the ``ImageSet`` protocol, sets held in memory, and views of a part of a set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megadit.data.listing import Listing
from megadit.errors import say

T = TypeVar("T")

ProgressCallback = Callable[[int, int], None]  # items done, items in all


@dataclass(frozen=True)
class StoredFacts:
    """What a set stores in place of pixels (latents) and beside them (text features, target features of REPA).

    Sizes are 0 and names empty where nothing is stored.
    """

    channels: int = 0  # of the latents; 0: the set holds pixels
    size: int = 0  # side of the latents
    factor: int = 1  # image pixels per latent pixel
    scale: float = 1.0  # by which latents are multiplied already
    shift: float = 0.0
    moments: bool = False  # mean and standard deviation of a posterior, (2 channels, h, w), to be sampled
    mirrored: bool = False  # whether latents and features of the mirrored images are stored too
    codec: str = ""  # class and hash of the weights, as megadit.data.codecs.codec.codec_identity gives them
    text_dim: int = 0
    text_length: int = 0  # tokens of the longest text
    pooled_dim: int = 0
    text_encoder: str = ""
    feature_dim: int = 0
    feature_encoder: str = ""


def latents_of(stored: StoredFacts | None) -> StoredFacts | None:
    """The facts of a set that stores latents; None of a set of pixels."""
    return stored if stored is not None and stored.channels else None


class ImageSet(Protocol):
    """Images by index. Everything is a pure function of the index, so any process can read any image."""

    @property
    def name(self) -> str:
        """The set's name, as in ``data.name``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty when images have no labels."""

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""

    @property
    def notice(self) -> str:
        """Licence and attribution to show beside pictures; empty if there is none."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on how the set was read, a sentence each, with the path: files left out, captions that are missing.

        Printed once as ``note:`` where a command begins (``print_remarks``).
        """

    def __len__(self) -> int: ...

    @property
    def stores_latents(self) -> bool:
        """Whether ``image`` gives latents, scaled as the model takes them, instead of pixels."""

    @property
    def stored(self) -> StoredFacts | None:
        """What is stored besides pixels; None: nothing."""

    @property
    def mirrored(self) -> ImageSet | None:
        """The same set with latents and features of the mirrored images, where these are stored; else None."""

    def image(self, i: int) -> Tensor:
        """uint8 (C, H, W), or latents in any floating dtype. Raises ``UserError`` when its file cannot be read."""

    def label(self, i: int) -> int:
        """Class index; 0 when there are no classes."""

    def caption(self, i: int) -> str:
        """The caption; may be empty."""

    def source_of(self, i: int) -> str:
        """Where image i comes from, for messages: its file, or its key and tar."""

    def extras(self, i: int) -> dict[str, Tensor]:
        """Tensors stored beside the image, the same ones for every image of a set.

        text (L, D), text_mask bool (L,) and pooled (P,): features of the caption.
        features (F, h, w): of the image, for REPA.
        """

    def null_extras(self) -> dict[str, Tensor]:
        """text, text_mask and pooled of the empty caption, with shapes as in ``extras``, if stored; else {}."""

    def listing(self) -> Listing:
        """The files that the whole set is read from, in order, with their sizes; opens none."""


class UnsplitSet(ImageSet, Protocol):
    """What a data source loads: all images, before any are held out for validation."""

    @property
    def bases(self) -> Sequence[str]:
        """A base name per image; images with the same one are variants of one picture, and held out together."""


class PixelSet:
    """A base class of sets that store pixels alone."""

    stores_latents = False
    stored: StoredFacts | None = None
    mirrored: ImageSet | None = None

    def extras(self, i: int) -> dict[str, Tensor]:
        return {}

    def null_extras(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class ArraySet(PixelSet):
    """A set in memory as one uint8 tensor (N, C, h, w), resized to ``image_size`` on access where that is not h.

    files: names and bytes of the files that it was read from; empty: one, of the pixels.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    notice: str
    images: Tensor
    labels: Tensor
    captions: tuple[str, ...]
    bases: tuple[str, ...]
    files: tuple[tuple[str, int], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return int(self.images.shape[1])

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def image(self, i: int) -> Tensor:
        image = self.images[i]
        return image if image.shape[-1] == self.image_size else _resize(image, self.image_size)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def caption(self, i: int) -> str:
        return self.captions[i]

    def source_of(self, i: int) -> str:
        return f"image {i} of {self.name}"

    def listing(self) -> Listing:
        files = self.files or ((self.name, self.images.nbytes),)
        names, sizes = zip(*files, strict=True)
        return Listing("file", tuple(map(os.fsencode, names)), sizes, self.labels.numpy(), self.captions)


def _resize(image: Tensor, size: int) -> Tensor:
    """Bicubic (Pillow's antialiased filter) resize of uint8 (C, h, w) to (C, size, size)."""
    import numpy as np
    from PIL import Image

    planes = [Image.fromarray(plane.numpy()).resize((size, size), Image.Resampling.BICUBIC) for plane in image]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


class _OfSource(Generic[T]):
    """An attribute of a ``Subset`` that is the one of its source."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, subset: Subset, owner: type | None = None) -> T:
        value: T = getattr(subset.source, self.name)
        return value


@dataclass(frozen=True, eq=False)
class Subset:
    """The images ``indices`` of another set, in that order; without classes when ``labelled`` is False.

    ``labels_kept`` are the source's labels that occur, by new label; None keeps all labels as they are.
    """

    source: ImageSet
    indices: tuple[int, ...]
    labelled: bool = True
    labels_kept: tuple[int, ...] | None = None

    name = _OfSource[str]()
    channels = _OfSource[int]()
    image_size = _OfSource[int]()
    notice = _OfSource[str]()
    remarks = _OfSource[tuple[str, ...]]()
    stores_latents = _OfSource[bool]()
    stored = _OfSource[StoredFacts | None]()
    null_extras = _OfSource[Callable[[], dict[str, Tensor]]]()
    listing = _OfSource[Callable[[], Listing]]()

    @property
    def classes(self) -> tuple[str, ...]:
        names, labels = self.source.classes, self.labels_kept
        if not self.labelled:
            return ()
        return names if labels is None else tuple(names[label] for label in labels)

    @property
    def mirrored(self) -> ImageSet | None:
        source = self.source.mirrored
        return None if source is None else replace(self, source=source)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> Tensor:
        return self.source.image(self.indices[i])

    def label(self, i: int) -> int:
        if not self.labelled:
            return 0
        label = self.source.label(self.indices[i])
        return label if self.labels_kept is None else self.labels_kept.index(label)

    def caption(self, i: int) -> str:
        return self.source.caption(self.indices[i])

    def source_of(self, i: int) -> str:
        return self.source.source_of(self.indices[i])

    def extras(self, i: int) -> dict[str, Tensor]:
        return self.source.extras(self.indices[i])


@dataclass(frozen=True)
class DatasetFacts:
    """What the model must fit (see ``megadit.data.checks``), and what a summary of the data prints."""

    name: str
    channels: int
    image_size: int
    num_classes: int
    size: int
    notice: str
    stored: StoredFacts | None = None


def describe(dataset: ImageSet) -> DatasetFacts:
    """The facts of a set; reads no image."""
    return DatasetFacts(
        name=dataset.name,
        channels=dataset.channels,
        image_size=dataset.image_size,
        num_classes=len(dataset.classes),
        size=len(dataset),
        notice=dataset.notice,
        stored=dataset.stored,
    )


def print_remarks(images: ImageSet) -> None:
    """Print the remarks of a set to stderr, each as a ``note:``, unless another process of this host does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for remark in images.remarks:
            say(f"note: {remark}")


def source_and_indices(images: ImageSet) -> tuple[ImageSet, Sequence[int]]:
    """The set that a ``Subset`` was chosen from, and its indices there; of another set itself and all indices."""
    return (images.source, images.indices) if isinstance(images, Subset) else (images, range(len(images)))


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spaced."""
    chosen = min(count, len(items))
    return [items[number * len(items) // chosen] for number in range(chosen)]


def stack_images(dataset: ImageSet, indices: Sequence[int]) -> Tensor:
    """Images of several indices: uint8 (B, C, H, W)."""
    return torch.stack([dataset.image(i) for i in indices])
