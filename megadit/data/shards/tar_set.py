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
from megadit.data.dataset import ImageSet, StoredFacts
from megadit.data.labels import class_names_of_numbers
from megadit.data.listing import Listing, digest
from megadit.data.shards import members
from megadit.data.shards.index import SampleIndex, cached_index, load_index
from megadit.data.shards.manifest import Manifest, check_sizes, load_manifest
from megadit.data.shards.shard_files import (
    CAPTION,
    FEATURES,
    FEATURES_MIRRORED,
    IMAGES,
    INDEX,
    JSON,
    LATENT,
    LATENT_MIRRORED,
    MANIFEST,
    NULL_TEXT,
    POOLED,
    RECIPE,
    TEXT,
    ShardFile,
    find_shards,
    overlooked,
    shown_name,
)
from megadit.data.sources.image_folder.folder_set import DEFAULT_SIZE
from megadit.errors import UserError
from megadit.extensions import DATA_SOURCES
from megadit.files.file_kind import file_instead
from megadit.files.json_fields import shown
from megadit.files.text import replace_surrogates


@dataclass(frozen=True, eq=False)
class TarSet:
    """Samples of tars. extra: which of text, pooled, features are read.  turned: read copies of mirrored images."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    notice: str
    folder: str
    shards: tuple[ShardFile, ...]
    index: SampleIndex
    sums: tuple[str, ...] = ()  # SHA-256 of each shard; empty without a manifest
    stored: StoredFacts | None = None
    extra: tuple[str, ...] = ()
    turned: bool = False
    crop: Crop = "adm"  # of images of another size than image_size
    remarks: tuple[str, ...] = ()

    @property
    def bases(self) -> tuple[str, ...]:
        """Base names, by which samples are held out."""
        return self.index.bases

    @property
    def stores_latents(self) -> bool:
        return self.stored is not None and self.stored.channels > 0

    @property
    def mirrored(self) -> ImageSet | None:
        return replace(self, turned=not self.turned) if self.stored is not None and self.stored.mirrored else None

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> Tensor:
        if self.stored is None or not self.stored.channels:
            name = next((name for name in IMAGES if self.index.place(i, name)), IMAGES[0])
            where = self.where(i, name)
            return members.read_picture(self.member(i, name), self.channels, self.image_size, where, self.crop)
        stored = self.stored
        shape = ((2 if stored.moments else 1) * stored.channels, stored.size, stored.size)
        return self._array(i, LATENT_MIRRORED if self.turned else LATENT, shape)

    def label(self, i: int) -> int:
        return max(int(self.index.labels[i]), 0)

    def caption(self, i: int) -> str:
        facts = {}
        if self.index.place(i, JSON):
            facts = members.read_json(self.member(i, JSON), self.where(i, JSON))
            caption = facts.get("caption")
            if isinstance(caption, str):
                return replace_surrogates(caption)
            if caption is not None:  # null, as img2dataset writes it: there is none
                raise UserError(
                    f"data.path: {self.where(i, JSON)} has caption {shown_name(shown(caption))}, which must be a text; "
                    "correct it, or leave it out to take the .txt"
                )
        if self.index.place(i, CAPTION):
            return members.read_text(self.member(i, CAPTION), self.where(i, CAPTION))
        text = facts.get("text")  # as Hugging Face's data sets call it
        return replace_surrogates(text) if isinstance(text, str) else ""

    def source_of(self, i: int) -> str:
        return f"{self.index.keys[i]} in {self.shards[int(self.index.shard[i])].path}"

    def extras(self, i: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        stored = self.stored
        if stored is None:
            return found
        if "text" in self.extra:
            text = self._array(i, TEXT, (None, stored.text_dim))
            found["text"] = text.new_zeros(stored.text_length, stored.text_dim)
            found["text"][: len(text)] = text
            found["text_mask"] = torch.arange(stored.text_length) < len(text)
        if "pooled" in self.extra:
            found["pooled"] = self._array(i, POOLED, (stored.pooled_dim,))
        if "features" in self.extra:
            name = FEATURES_MIRRORED if self.turned else FEATURES
            found["features"] = self._array(i, name, (stored.feature_dim, None, None))
        return found

    def where(self, i: int, member: str) -> str:
        """What to call a member in a message."""
        return f"{shown_name(self.index.keys[i])}.{member} in {self.shards[int(self.index.shard[i])].path}"

    def member(self, i: int, name: str) -> bytes:
        """The bytes of a member. Raises UserError if the sample has none, or its tar has become unreadable."""
        place = self.index.place(i, name)
        if place is None:
            raise UserError(f"data.path: there is no {self.where(i, name)}; write the shard again")
        return self.shards[int(self.index.shard[i])].read(*place)

    def null_extras(self) -> dict[str, Tensor]:
        """text (n, D), text_mask (n,) and, where it is stored, pooled (P,) of the empty caption."""
        stored = self.stored
        if stored is None or not stored.text_dim:
            return {}
        found = dict(_null_text(self.folder))
        wanted = {"text": (len(found["text"]), stored.text_dim), "pooled": (stored.pooled_dim,)}
        for name, shape in wanted.items():
            own = tuple(found[name].shape) if name in found else (0,)
            if own != shape:
                raise UserError(
                    f"data.path: {name} in {Path(self.folder) / NULL_TEXT} has the shape {own}, but {MANIFEST} says "
                    f"{shape}; copy both again, or encode the set again"
                )
        return found

    def listing(self) -> Listing:
        names = tuple(os.fsencode(os.path.relpath(shard.path, self.folder)) for shard in self.shards)
        index = self.index
        texts = ("\0".join(part).encode("utf-8", "surrogatepass") for part in (index.members, index.keys, index.bases))
        detail = digest([*texts, *(np.ascontiguousarray(part).tobytes() for part in (index.shard, index.sizes))])
        return Listing("shard", names, [shard.size for shard in self.shards], index.labels, detail=detail)

    def _array(self, i: int, member: str, shape: tuple[int | None, ...]) -> Tensor:
        array = members.read_array(self.member(i, member), self.where(i, member))
        fits = array.dim() == len(shape) and all(
            want in (None, own) for want, own in zip(shape, array.shape, strict=True)
        )
        limit = self.stored.text_length if member == TEXT and self.stored is not None else None
        if not fits or (limit is not None and len(array) > limit) or not array.is_floating_point():
            raise UserError(
                f"data.path: {self.where(i, member)} is {array.dtype} of shape {tuple(array.shape)}, which is not what "
                f"{MANIFEST} says; write the set again"
            )
        return array


@functools.lru_cache(maxsize=4)
def _null_text(folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(folder) / NULL_TEXT
    try:
        found = load_file(path)
        return {**found, "text_mask": torch.ones(len(found["text"]), dtype=torch.bool)}
    except Exception as error:  # whatever safetensors says about a missing or damaged file
        told = f": {other}" if (other := file_instead(path, "safetensors")) else f" ({error}); copy it again"
        raise UserError(f"data.path: {path} cannot be read{told}, or encode the set again") from error


def load_tars(config: DataConfig, num_classes: int | None = None) -> TarSet:
    """The set at ``data.path``, checked against its manifest: every tar there, and as long as it was written.

    Without a manifest, which other people's tars lack, the tars are scanned once, and images, captions and labels are
    what they hold. ``num_classes``: the model's, against which labels that are numbers are held; None: not known.
    Raises UserError that names the tar and what to do.
    """
    folder, shards, whole = find_shards(config.path)
    manifest = load_manifest(folder)
    if manifest is None and (folder / RECIPE).is_file():
        raise UserError(f"data.path: the writing of {folder} did not end; give the command that began it again")
    if manifest is None:
        return _without_manifest(config, folder, shards, num_classes, overlooked(folder) if whole else ())
    numbers = _numbers(manifest, folder, shards, whole)
    files = check_sizes(manifest, folder, numbers)
    index = load_index(folder / INDEX)
    _check_index(index, manifest, folder)
    if numbers != list(range(len(manifest.shards))):
        index = index.of_shards(numbers)
    stored = manifest.stored
    size = manifest.image_size if stored is not None and stored.channels else config.image_size or manifest.image_size
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


def _numbers(manifest: Manifest, folder: Path, shards: list[Path], whole: bool) -> list[int]:
    """The manifest's numbers of the tars that are meant."""
    found = [(path, manifest.number(path.name)) for path in shards]
    strange = next((path for path, number in found if number is None), None)
    if strange is not None:
        raise UserError(
            f"data.path: {strange} is not in {folder / MANIFEST}; take it out of the folder, or name the shards to "
            "train on by a pattern"
        )
    return list(range(len(manifest.shards))) if whole else [number for _, number in found if number is not None]


def _check_crop(config: DataConfig, manifest: Manifest, folder: Path) -> None:
    """Hold ``data.crop`` against that of images which were cut when the set was written, and are not cut again.

    Built-in sets are not cut; of tars that were made of tars the default may stand for images of either.
    """
    made = manifest.data
    was = made.get("crop", config.crop)
    cut = made.get("name") == "image-folder" or (made.get("name") == "webdataset" and was != "adm")
    if cut and was != config.crop:
        raise UserError(
            f"data.crop: {config.crop}, but the images of {folder} were cut by {was} when it was written; set "
            f"data.crop={was}, or write the set again"
        )


def cut_before_crop(config: DataConfig) -> str | None:
    """What people should know of a set that was cut from a folder of images before ``data.crop`` was a key."""
    if not DATA_SOURCES.get(config.name).may_store or config.crop == "adm":
        return None
    folder = find_shards(config.path)[0]
    manifest = load_manifest(folder)
    made = {} if manifest is None else manifest.data
    if "crop" in made or made.get("name") != "image-folder":
        return None
    return f"the images of {folder} were cut by adm, before there was data.crop: {config.crop} has no effect on them"


def _extra(config: DataConfig, stored: StoredFacts | None) -> tuple[str, ...]:
    if stored is None:
        return ()
    text = config.condition == "text" and stored.text_dim > 0
    features = config.features is not None and config.features.encoder == "stored" and stored.feature_dim > 0
    wanted = (("text", text), ("pooled", text and stored.pooled_dim > 0), ("features", features))
    return tuple(name for name, is_wanted in wanted if is_wanted)


def _check_index(index: SampleIndex, manifest: Manifest, folder: Path) -> None:
    """Hold the index against the counts and sizes of the manifest."""
    said = [shard.samples for shard in manifest.shards]
    again = "copy both again, or write the set again"
    if len(index) != manifest.samples or sum(said) != manifest.samples:
        raise UserError(
            f"data.path: {folder / INDEX} has {len(index)} samples, but {MANIFEST} says {manifest.samples}; {again}"
        )
    if not index.fits([shard.bytes for shard in manifest.shards]) or index.counts(len(said)) != said:
        raise UserError(
            f"data.path: {folder / INDEX} has samples in other tars, or in other places of them, than {MANIFEST} says; "
            f"{again}"
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
        remarks=(*index.survey.remarks(), *remarks),
    )


def _check_images(index: SampleIndex, files: tuple[ShardFile, ...]) -> None:
    """Raise UserError where samples have no image, with what they have in its place."""
    bare = index.lacking(*IMAGES)
    if not len(bare):
        return
    first = int(bare[0])
    place = f"{shown_name(index.keys[first])} in {files[int(index.shard[first])].path}"
    others = f", nor have {len(bare) - 1:,} others" if len(bare) > 1 else ""
    if LATENT in index.members:
        remedy = f"arrays need the {MANIFEST} that says how they were scaled"
    elif other := index.survey.examples.get("extension"):
        remedy = f"write images as one of these (not read is {', '.join(other)}), or take the sample out of the tar"
    else:
        remedy = "take the sample out of the tar"
    raise UserError(f"data.path: {place} has no image ({', '.join(IMAGES)}){others}; {remedy}")


def _files(shards: list[Path]) -> tuple[ShardFile, ...]:
    """The tars as they are now. Raises UserError for one that cannot be read."""
    found = []
    for path in shards:
        try:
            found.append(ShardFile.of(path))
        except OSError as error:
            why = file_instead(path, "tar") or f"{error.strerror or error}; copy it there, or take it out"
            raise UserError(f"data.path: cannot read {path}: {why}") from None
    return tuple(found)


def _classes(
    index: SampleIndex, files: tuple[ShardFile, ...], config: DataConfig, num_classes: int | None
) -> tuple[str, ...]:
    """Names by label. Raises UserError where samples have no label, or one that cannot be meant."""

    def where(i: int) -> str:
        return f"{index.label_member(i)} in {files[int(index.shard[i])].path}"

    if index.survey.bad_label:
        raise UserError(index.survey.bad_label)
    without = np.flatnonzero(index.labels < 0)
    if len(without):
        first = int(without[0])
        place = f"{shown_name(index.keys[first])} in {files[int(index.shard[first])].path}"
        others = f", nor have {len(without) - 1:,} others" if len(without) > 1 else ""
        raise UserError(
            f"data.path: {place} has no label (a .cls member, or label in its .json){others}; add labels, or set "
            "data.condition to text or none"
        )
    if index.classes:
        return index.classes
    known = None if config.classes is not None else num_classes  # data.classes chooses some of the set's
    return class_names_of_numbers(index.labels.tolist(), where, known)
