"""``TarSet``: local tars as a set like any other, every sample found through the index.

So a run sees the same images in the same order as from the set that the tars were made of, with any number of ranks
and workers, and resumes from its step alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megadit.config import DataConfig
from megadit.config.schema.data import Crop
from megadit.data.dataset import ImageSet, StoredFacts, latents_of
from megadit.data.labels import class_names_of_numbers
from megadit.data.listing import Listing, digest
from megadit.data.shards import members, naming
from megadit.data.shards.index import SampleIndex, cached_index, load_index
from megadit.data.shards.manifest import Manifest, check_sizes, load_manifest
from megadit.data.shards.naming import IMAGES, INDEX, JSON, MANIFEST, shown_name
from megadit.data.shards.shard_files import ShardFile, find_shards, unread_tars
from megadit.data.sources.image_folder.folder_set import DEFAULT_SIZE
from megadit.errors import UserError
from megadit.extensions import DATA_SOURCES
from megadit.files.file_kind import file_instead
from megadit.files.json_fields import shown
from megadit.files.text import replace_surrogates


@dataclass(frozen=True, eq=False)
class TarSet:
    """The samples of tars. folder: of the tars.  sums: SHA-256 of each shard; empty without a manifest.

    extra: which of text, pooled and features are read.  turned: what was stored of the mirrored images is read.
    crop: of images of another size than ``image_size``.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    notice: str
    folder: str
    shards: tuple[ShardFile, ...]
    index: SampleIndex
    sums: tuple[str, ...] = ()
    stored: StoredFacts | None = None
    extra: tuple[str, ...] = ()
    turned: bool = False
    crop: Crop = "adm"
    remarks: tuple[str, ...] = ()

    @property
    def bases(self) -> tuple[str, ...]:
        """Base names, by which samples are held out."""
        return self.index.bases

    @property
    def stores_latents(self) -> bool:
        return latents_of(self.stored) is not None

    @property
    def mirrored(self) -> ImageSet | None:
        return replace(self, turned=not self.turned) if self.stored is not None and self.stored.mirrored else None

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> Tensor:
        latents = latents_of(self.stored)
        if latents is None:
            name = next((name for name in IMAGES if self.index.span(i, name)), IMAGES[0])
            where = self.where(i, name)
            return members.read_picture(self.member(i, name), self.channels, self.image_size, where, self.crop)
        shape = ((2 if latents.moments else 1) * latents.channels, latents.size, latents.size)
        return self._array(i, naming.LATENT_MIRRORED if self.turned else naming.LATENT, shape)

    def label(self, i: int) -> int:
        return max(int(self.index.labels[i]), 0)

    def caption(self, i: int) -> str:
        values = {}
        if self.index.span(i, JSON):
            values = members.read_json(self.member(i, JSON), self.where(i, JSON))
            caption = values.get("caption")
            if isinstance(caption, str):
                return replace_surrogates(caption)
            if caption is not None:  # null, as img2dataset writes it: there is none
                raise UserError(
                    f"data.path: {self.where(i, JSON)} has caption {shown_name(shown(caption))}, which must be a text; "
                    "correct it, or leave it out to take the .txt"
                )
        if self.index.span(i, naming.CAPTION):
            return members.read_text(self.member(i, naming.CAPTION), self.where(i, naming.CAPTION))
        text = values.get("text")  # as Hugging Face's data sets call it
        return replace_surrogates(text) if isinstance(text, str) else ""

    def source_of(self, i: int) -> str:
        return f"{self.index.keys[i]} in {self.shard_of(i).path}"

    def extras(self, i: int) -> dict[str, Tensor]:
        extras: dict[str, Tensor] = {}
        stored = self.stored
        if stored is None:
            return extras
        if "text" in self.extra:
            text = self._array(i, naming.TEXT, (None, stored.text_dim))
            extras["text"] = torch.nn.functional.pad(text, (0, 0, 0, stored.text_length - len(text)))
            extras["text_mask"] = torch.arange(stored.text_length) < len(text)
        if "pooled" in self.extra:
            extras["pooled"] = self._array(i, naming.POOLED, (stored.pooled_dim,))
        if "features" in self.extra:
            name = naming.FEATURES_MIRRORED if self.turned else naming.FEATURES
            extras["features"] = self._array(i, name, (stored.feature_dim, None, None))
        return extras

    def shard_of(self, i: int) -> ShardFile:
        """The tar of sample i."""
        return self.shards[int(self.index.shard[i])]

    def where(self, i: int, member: str) -> str:
        """A member's name and tar, for messages."""
        return f"{shown_name(self.index.keys[i])}.{member} in {self.shard_of(i).path}"

    def member(self, i: int, name: str) -> bytes:
        """The bytes of a member. Raises UserError if the sample has none, or its tar has become unreadable."""
        span = self.index.span(i, name)
        if span is None:
            raise UserError(f"data.path: there is no {self.where(i, name)}; write the shard again")
        return self.shard_of(i).read(*span)

    def null_extras(self) -> dict[str, Tensor]:
        """text (n, D), text_mask (n,) and, where it is stored, pooled (P,) of the empty caption."""
        stored = self.stored
        if stored is None or not stored.text_dim:
            return {}
        extras = dict(_null_text(self.folder))
        for name, expected in (("text", (len(extras["text"]), stored.text_dim)), ("pooled", (stored.pooled_dim,))):
            shape = tuple(extras[name].shape) if name in extras else (0,)
            if shape != expected:
                raise UserError(
                    f"data.path: {name} in {Path(self.folder) / naming.NULL_TEXT} has the shape {shape}, but "
                    f"{MANIFEST} says {expected}; copy both again, or encode the set again"
                )
        return extras

    def listing(self) -> Listing:
        names = tuple(os.fsencode(os.path.relpath(shard.path, self.folder)) for shard in self.shards)
        index = self.index
        texts = ("\0".join(part).encode("utf-8", "surrogatepass") for part in (index.members, index.keys, index.bases))
        detail = digest([*texts, *(np.ascontiguousarray(part).tobytes() for part in (index.shard, index.sizes))])
        return Listing("shard", names, [shard.size for shard in self.shards], index.labels, detail=detail)

    def _array(self, i: int, member: str, shape: tuple[int | None, ...]) -> Tensor:
        array = members.read_array(self.member(i, member), self.where(i, member))
        fits = array.dim() == len(shape) and all(
            expected in (None, side) for expected, side in zip(shape, array.shape, strict=True)
        )
        limit = self.stored.text_length if member == naming.TEXT and self.stored is not None else None
        if not fits or (limit is not None and len(array) > limit) or not array.is_floating_point():
            raise UserError(
                f"data.path: {self.where(i, member)} is {array.dtype} of shape {tuple(array.shape)}, which is not what "
                f"{MANIFEST} says; write the set again"
            )
        return array


@functools.lru_cache(maxsize=4)
def _null_text(folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(folder) / naming.NULL_TEXT
    try:
        tensors = load_file(path)
        return {**tensors, "text_mask": torch.ones(len(tensors["text"]), dtype=torch.bool)}
    except Exception as error:  # whatever safetensors says about a missing or damaged file
        reason = f": {other}" if (other := file_instead(path, "safetensors")) else f" ({error}); copy it again"
        raise UserError(f"data.path: {path} cannot be read{reason}, or encode the set again") from error


def load_tars(config: DataConfig, num_classes: int | None = None) -> TarSet:
    """The set at ``data.path``, checked against its manifest: every tar there, and as long as it was written.

    Without a manifest, which only megadit writes, the tars are scanned once for images, captions and labels.
    ``num_classes``: the model's, which number labels must not reach; None: not known.
    Raises UserError that names the tar and what to do.
    """
    folder, shards, is_folder = find_shards(config.path)
    manifest = load_manifest(folder)
    if manifest is None and (folder / naming.RECIPE).is_file():
        raise UserError(f"data.path: the writing of {folder} did not end; give the command that began it again")
    if manifest is None:
        return _without_manifest(config, folder, shards, num_classes, unread_tars(folder) if is_folder else ())
    numbers = _shard_numbers(manifest, folder, shards, is_folder)
    files = check_sizes(manifest, folder, numbers)
    index = load_index(folder / INDEX)
    _check_index(index, manifest, folder)
    if numbers != list(range(len(manifest.shards))):
        index = index.of_shards(numbers)
    stored = manifest.stored
    size = manifest.image_size if latents_of(stored) else config.image_size or manifest.image_size
    if size == manifest.image_size:
        _check_crop(config, manifest, folder)
    return TarSet(
        name=manifest.name,
        classes=manifest.classes,
        channels=manifest.channels,
        image_size=size,
        notice=manifest.notice,
        folder=str(folder),
        shards=tuple(files),
        index=index,
        sums=tuple(manifest.shards[number].sha256 for number in numbers),
        stored=stored,
        extra=_extra(config, stored),
        crop=config.crop,
    )


def _shard_numbers(manifest: Manifest, folder: Path, shards: list[Path], is_folder: bool) -> list[int]:
    """The numbers in the manifest of the tars to read: all of them for a folder."""
    by_file = {shard.file: number for number, shard in enumerate(manifest.shards)}
    unknown = next((path for path in shards if path.name not in by_file), None)
    if unknown is not None:
        raise UserError(
            f"data.path: {unknown} is not in {folder / MANIFEST}; take it out of the folder, or name the shards to "
            "train on by a pattern"
        )
    return list(range(len(manifest.shards))) if is_folder else [by_file[path.name] for path in shards]


def _check_crop(config: DataConfig, manifest: Manifest, folder: Path) -> None:
    """Refuse another ``data.crop`` than that of images which were cropped when the set was written.

    Built-in sets are not cropped; of tars that were made of tars the default may stand for images of either crop.
    """
    written = manifest.data
    crop = written.get("crop", config.crop)
    cropped = written.get("name") == "image-folder" or (written.get("name") == "webdataset" and crop != "adm")
    if cropped and crop != config.crop:
        raise UserError(
            f"data.crop: {config.crop}, but the images of {folder} were cut by {crop} when it was written; set "
            f"data.crop={crop}, or write the set again"
        )


def cut_before_crop(config: DataConfig) -> str | None:
    """A note on a set that was cropped from a folder of images before ``data.crop`` was a key, where that differs."""
    if not DATA_SOURCES.get(config.name).may_store or config.crop == "adm":
        return None
    folder = find_shards(config.path)[0]
    manifest = load_manifest(folder)
    written = {} if manifest is None else manifest.data
    if "crop" in written or written.get("name") != "image-folder":
        return None
    return f"the images of {folder} were cut by adm, before there was data.crop: {config.crop} has no effect on them"


def _extra(config: DataConfig, stored: StoredFacts | None) -> tuple[str, ...]:
    if stored is None:
        return ()
    text = config.condition == "text" and stored.text_dim > 0
    features = config.features is not None and config.features.encoder == "stored" and stored.feature_dim > 0
    reads = {"text": text, "pooled": text and stored.pooled_dim > 0, "features": features}
    return tuple(name for name, is_read in reads.items() if is_read)


def _check_index(index: SampleIndex, manifest: Manifest, folder: Path) -> None:
    """Raise UserError where the index has other counts or sizes than the manifest."""
    counts = [shard.samples for shard in manifest.shards]
    remedy = "copy both again, or write the set again"
    if len(index) != manifest.samples or sum(counts) != manifest.samples:
        raise UserError(
            f"data.path: {folder / INDEX} has {len(index)} samples, but {MANIFEST} says {manifest.samples}; {remedy}"
        )
    if not index.fits([shard.bytes for shard in manifest.shards]) or index.counts(len(counts)) != counts:
        raise UserError(
            f"data.path: {folder / INDEX} has samples in other tars, or in other places of them, than {MANIFEST} says; "
            f"{remedy}"
        )


def _without_manifest(
    config: DataConfig, folder: Path, shards: list[Path], num_classes: int | None, remarks: Sequence[str]
) -> TarSet:
    files = _files(shards)
    index = cached_index(files) if files else None
    if index is None or not len(index):
        raise UserError(f"data.path: the tars of {config.path} have no samples; give others")
    _check_images(index, files)
    return TarSet(
        name="webdataset",
        classes=_classes(index, files, config, num_classes) if config.condition == "class" else (),
        channels=3,
        image_size=config.image_size or DEFAULT_SIZE,
        notice="",
        folder=str(folder),
        shards=files,
        index=index,
        crop=config.crop,
        remarks=(*index.summary.remarks(), *remarks),
    )


def _check_images(index: SampleIndex, files: tuple[ShardFile, ...]) -> None:
    """Raise UserError where samples have no image, with what they have in its place."""
    bare = index.without(*IMAGES)
    if not len(bare):
        return
    if naming.LATENT in index.members:
        remedy = f"arrays need the {MANIFEST} that says how they were scaled"
    elif other := index.summary.examples.get("extension"):
        remedy = f"write images as one of these (not read is {', '.join(other)}), or take the sample out of the tar"
    else:
        remedy = "take the sample out of the tar"
    raise _incomplete(index, files, bare, f"image ({', '.join(IMAGES)})", remedy)


def _incomplete(
    index: SampleIndex, files: Sequence[ShardFile], samples: np.ndarray, part: str, remedy: str
) -> UserError:
    """The error that names the first of the samples that lack a part, and counts the others."""
    first = int(samples[0])
    others = f", nor have {len(samples) - 1:,} others" if len(samples) > 1 else ""
    sample = f"{shown_name(index.keys[first])} in {files[int(index.shard[first])].path}"
    return UserError(f"data.path: {sample} has no {part}{others}; {remedy}")


def _files(shards: list[Path]) -> tuple[ShardFile, ...]:
    """The tars as they are now. Raises UserError for one that cannot be read."""
    files = []
    for path in shards:
        try:
            files.append(ShardFile.of(path))
        except OSError as error:
            reason = file_instead(path, "tar") or f"{error.strerror or error}; copy it there, or take it out"
            raise UserError(f"data.path: cannot read {path}: {reason}") from None
    return tuple(files)


def _classes(
    index: SampleIndex, files: tuple[ShardFile, ...], config: DataConfig, num_classes: int | None
) -> tuple[str, ...]:
    """Names by label. Raises UserError where samples have no label, or one that is not plausible."""

    def where(i: int) -> str:
        return f"{index.label_member(i)} in {files[int(index.shard[i])].path}"

    if index.summary.bad_label:
        raise UserError(index.summary.bad_label)
    unlabelled = np.flatnonzero(index.labels < 0)
    if len(unlabelled):
        remedy = "add labels, or set data.condition to text or none"
        raise _incomplete(index, files, unlabelled, "label (a .cls member, or label in its .json)", remedy)
    if index.classes:
        return index.classes
    known = None if config.classes is not None else num_classes  # data.classes chooses some of the set's
    return class_names_of_numbers(index.labels.tolist(), where, known)
