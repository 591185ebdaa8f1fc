"""What a set of images is: the ``ImageSet`` protocol, sets held in memory, and views of a part of a set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megadit.data.listing import Listing
from megadit.errors import say

T = TypeVar("T")

# text (L, D), text_mask bool (L,) and pooled (P,): features of the caption. features (F, h, w): of the image, for REPA.
EXTRAS = ("text", "text_mask", "pooled", "features")


@dataclass(frozen=True)
class StoredFacts:
    """What a set holds ready-made in place of pixels and beside them. Sizes are 0 and names empty where nothing is."""

    channels: int = 0  # of the latents; 0: the set holds pixels
    size: int = 0  # side of the latents
    factor: int = 1  # image pixels per latent pixel
    scale: float = 1.0  # what is stored was multiplied by it already
    shift: float = 0.0
    moments: bool = False  # mean and standard deviation of a posterior, (2 channels, h, w), to be drawn from
    mirrored: bool = False  # whether latents and features of the mirrored image are there too
    codec: str = ""  # class and hash of the weights, as megadit.data.codecs.codec.codec_identity gives them
    text_dim: int = 0
    text_length: int = 0  # tokens of the longest text
    pooled_dim: int = 0
    text_encoder: str = ""
    feature_dim: int = 0
    feature_encoder: str = ""


class ImageSet(Protocol):
    """Images by index. Everything is a pure function of the index, so any process can ask for any image."""

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
        """What people should know of how the set was read: files left out, captions that are missing.

        A sentence each, which names the place; printed once as ``note:`` where a command begins (``print_remarks``).
        """

    def __len__(self) -> int: ...

    @property
    def stores_latents(self) -> bool:
        """Whether ``image`` gives latents, scaled as the model takes them, in place of pixels."""

    @property
    def stored(self) -> StoredFacts | None:
        """What is stored besides pixels; None: nothing is."""

    @property
    def mirrored(self) -> ImageSet | None:
        """The same set with what was made of mirrored images (latents, features), where it is stored; else None."""

    def image(self, i: int) -> Tensor:
        """uint8 (C, H, W), or latents in any floating dtype. Raises ``UserError`` when its file cannot be read."""

    def label(self, i: int) -> int:
        """Class index; 0 when there are no classes."""

    def caption(self, i: int) -> str:
        """A description in words; may be empty."""

    def source_of(self, i: int) -> str:
        """Where image i comes from, for people: its file, or its place in one."""

    def extras(self, i: int) -> dict[str, Tensor]:
        """What is stored beside the image: any of ``EXTRAS``; the same ones for every image of a set."""

    def null_extras(self) -> dict[str, Tensor]:
        """text, text_mask and pooled of the empty caption, shaped as in ``extras``, where they are stored; else {}."""

    def listing(self) -> Listing:
        """What the whole set is read from, in its order; asks the file system, and opens nothing."""


class UnsplitSet(ImageSet, Protocol):
    """What a data source loads: nothing is held out yet."""

    @property
    def bases(self) -> Sequence[str]:
        """A base name per image: those with the same one are variants of one picture, and held out together."""


class PixelSet:
    """What a set of pixels answers that stores nothing beside them: a base of image sets."""

    stores_latents = False
    stored: StoredFacts | None = None
    mirrored: ImageSet | None = None

    def extras(self, i: int) -> dict[str, Tensor]:
        """None."""
        return {}

    def null_extras(self) -> dict[str, Tensor]:
        """None."""
        return {}


@dataclass(frozen=True, eq=False)
class ArraySet(PixelSet):
    """A set held in memory as one uint8 tensor (N, C, h, w), resized to ``image_size`` when that differs from h."""

    name: str
    classes: tuple[str, ...]
    image_size: int
    notice: str
    images: Tensor
    labels: Tensor
    captions: tuple[str, ...]
    bases: tuple[str, ...]  # base names: images with the same one are variants of one picture
    files: tuple[tuple[str, int], ...] = ()  # names and bytes of what it was read from; empty: one file of the pixels
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


@dataclass(frozen=True, eq=False)
class Subset:
    """The images ``indices`` of another set, in that order; without classes when ``labelled`` is False.

    ``kept`` are the source's labels that occur, by new label; None keeps all labels as they are.
    """

    source: ImageSet
    indices: tuple[int, ...]
    labelled: bool = True
    kept: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        if not self.labelled:
            return ()
        return self.source.classes if self.kept is None else tuple(self.source.classes[label] for label in self.kept)

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def image_size(self) -> int:
        return self.source.image_size

    @property
    def notice(self) -> str:
        return self.source.notice

    @property
    def remarks(self) -> tuple[str, ...]:
        return self.source.remarks

    @property
    def stores_latents(self) -> bool:
        return self.source.stores_latents

    @property
    def stored(self) -> StoredFacts | None:
        return self.source.stored

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
        return label if self.kept is None else self.kept.index(label)

    def caption(self, i: int) -> str:
        return self.source.caption(self.indices[i])

    def source_of(self, i: int) -> str:
        return self.source.source_of(self.indices[i])

    def extras(self, i: int) -> dict[str, Tensor]:
        return self.source.extras(self.indices[i])

    def null_extras(self) -> dict[str, Tensor]:
        return self.source.null_extras()

    def listing(self) -> Listing:
        return self.source.listing()


@dataclass(frozen=True)
class DatasetFacts:
    """What a model must agree with (see ``megadit.data.checks``) and what a summary tells."""

    name: str
    channels: int
    image_size: int
    num_classes: int
    size: int
    notice: str
    stored: StoredFacts | None = None


def describe(dataset: ImageSet) -> DatasetFacts:
    """The facts of a set, without touching an image."""
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
    """The set that ``images`` were chosen from, and their places in it; itself, if they are none of another."""
    return (images.source, images.indices) if isinstance(images, Subset) else (images, range(len(images)))


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spaced."""
    shown = min(count, len(items))
    return [items[number * len(items) // shown] for number in range(shown)]


def stack_images(dataset: ImageSet, indices: Sequence[int]) -> Tensor:
    """Images of several indices: uint8 (B, C, H, W)."""
    return torch.stack([dataset.image(i) for i in indices])
