"""The identity of a run's data, which its checkpoints store: classes, images, order, encoders. Compared on resuming.

Names, sizes and numbers, never pixels. Nothing of it depends on the path of the files, when they were written or how a
file system orders them, so that data which were moved are the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megadit.config import RunConfig
from megadit.config.schema.values import plain_text
from megadit.data.codecs.codec import codec_identity, scale_and_shift
from megadit.data.codecs.folder import codec_facts
from megadit.data.dataset import ImageSet, source_and_indices
from megadit.data.listing import digest, first_difference, record, same_files
from megadit.data.shards.tar_set import cut_before_crop
from megadit.data.text.encoders import build_encoder
from megadit.data.text.folders import fingerprint
from megadit.extensions import DATA_SOURCES

Identity = dict[str, Any]

_VERSION = 1
# Keys of the data section that are compared for checkpoints without an identity.
_OLD_KEYS = ("name", "condition", "flip", "crop", "val_fraction", "skin_tones")

_FIRST_CROP = "adm"  # how all images were cut before there was a key for it


def identify(config: RunConfig, train_set: ImageSet, val_set: ImageSet) -> Identity:
    """The identity of a run's data, of bounded size but for the names of its classes; asks the size of every file.

    Raises:
        UserError: an encoder's or a codec's folder cannot be read.
    """
    listing = train_set.listing()
    parts = [np.array(source_and_indices(images)[1], dtype="<i8") for images in (train_set, val_set)]
    data = config.data
    texts = data.condition == "text" and listing.captions is not None
    return {
        "version": _VERSION,
        "set": train_set.name,
        "condition": data.condition,
        "classes": list(train_set.classes),
        "training_images": len(train_set),
        "validation_images": len(val_set),
        "val_fraction": data.val_fraction,
        "files": record(listing),
        "split": digest(part.tobytes() for part in parts),
        "labels": digest(listing.labels[part].tobytes() for part in parts) if train_set.classes else "",
        "captions": digest(text.encode("utf-8", "surrogatepass") + b"\0" for text in listing.captions or ())
        if texts
        else "",
        "image_size": train_set.image_size,
        "flip": data.flip,
        "crop": None if train_set.stores_latents else getattr(source_and_indices(train_set)[0], "crop", None),
        "stored": None if train_set.stored is None else asdict(train_set.stored),
        "text_encoder": _text_encoder(config, train_set),
        "autoencoder": _autoencoder(config, train_set),
        "feature_encoder": _feature_encoder(config),
    }


def _text_encoder(config: RunConfig, images: ImageSet) -> str | None:
    if config.data.condition != "text" or (images.stored is not None and images.stored.text_dim):
        return None  # the stored features name their encoder
    return build_encoder(config.data.text).identity


def _autoencoder(config: RunConfig, images: ImageSet) -> dict[str, Any] | None:
    vae = config.data.vae
    if vae is None or images.stores_latents:
        return None
    facts = codec_facts(vae)
    scale, shift = scale_and_shift(vae, facts)
    return {"codec": codec_identity(vae), "factor": facts.factor, "scale": scale, "shift": shift}


def _feature_encoder(config: RunConfig) -> str | None:
    source = config.data.features
    if not config.objective.repa_weight or source is None or source.encoder == "stored":
        return None
    weights = f":{fingerprint(Path(source.path))}" if source.path is not None else ""
    return f"{source.encoder}{weights}:{source.image_size}"


def differences(before: Mapping[str, Any], after: Identity, images: ImageSet) -> list[str]:
    """The differences of ``after``, the identity of ``images``, from that of a checkpoint, ``before``: a clause each,
    with both values. Keys that only one of the two has are not compared.
    """
    before = {**after, **before}
    return [*_set_changes(before, after), *_image_changes(before, after, images), *_encoder_changes(before, after)]


def _set_changes(before: Mapping[str, Any], after: Identity) -> Iterator[str]:
    for key, words in (("set", "the data set was {0} and is {1}"), ("condition", "data.condition was {0} and is {1}")):
        if before[key] != after[key]:
            yield words.format(before[key], after[key])
    yield from _class_changes(before["classes"], after["classes"])


def _class_changes(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    if len(old) != len(new):
        other = next((name for name in (*old, *new) if (name in old) != (name in new)), "")
        yield f"there were {len(old)} classes and are {len(new)} ('{other}' is {'new' if other in new else 'gone'})"
        return
    changed = [number for number, names in enumerate(zip(old, new, strict=True)) if names[0] != names[1]]
    if changed:
        first, others = changed[0], len(changed) - 1
        more = f", and {others} more differ" if others else ""
        yield f"class {first} was '{old[first]}' and is '{new[first]}'{more}"


def _image_changes(before: Mapping[str, Any], after: Identity, images: ImageSet) -> Iterator[str]:
    """Other files, or other images, labels or captions of the same files."""
    counts = [
        f"{word} images {before[key]:,} → {after[key]:,}"
        for key, word in (("training_images", "training"), ("validation_images", "validation"))
        if before[key] != after[key]
    ]
    old, new = before["files"], after["files"]
    if old["unit"] != new["unit"]:
        counts.append(f"images were read from {old['unit']} files and are read from {new['unit']} files")
    elif not same_files(old, new):
        change = "" if old["count"] == new["count"] else f" ({old['count']:,} → {new['count']:,})"
        head = ", ".join(counts) or f"other {new['unit']}s{change}"
        yield f"{head} (first difference: {first_difference(old, images.listing())})"
        return
    if before["val_fraction"] != after["val_fraction"]:
        counts.insert(0, f"data.val_fraction {before['val_fraction']:g} → {after['val_fraction']:g}")
    if counts:
        yield ", ".join(counts)
    elif before["split"] != after["split"]:
        yield "other images of the same files are held out"
    elif before["labels"] != after["labels"]:
        yield "images of the same files have other labels"
    if before["captions"] and after["captions"] and before["captions"] != after["captions"]:
        yield "images of the same files have other captions"


def _encoder_changes(before: Mapping[str, Any], after: Identity) -> Iterator[str]:
    for key in ("image_size", "flip", "crop"):
        if before[key] != after[key] and not (key == "crop" and after[key] is None):  # latents are not cut
            yield f"data.{key} was {plain_text(before[key])} and is {plain_text(after[key])}"
    for key, words in (("text_encoder", "text encoder"), ("feature_encoder", "feature encoder of REPA")):
        if before[key] != after[key]:
            yield f"the {words} was {plain_text(before[key])} and is {plain_text(after[key])}"
    for key, words in (("autoencoder", "autoencoder"), ("stored", "array stored in shards")):
        old, new = before[key], after[key]
        if old is None or new is None:
            if old != new:
                yield f"there was {'no' if old is None else 'an'} {words} and now there is {'one' if new else 'none'}"
            continue
        changed = [name for name in new if name in old and old[name] != new[name]]
        if changed:
            both = ", ".join(f"{name} {plain_text(old[name])} → {plain_text(new[name])}" for name in changed)
            yield f"the {words} differs: {both}"


def config_differences(
    before: Mapping[str, Any], classes: Sequence[str] | None, config: RunConfig, images: ImageSet
) -> list[str]:
    """As ``differences``, of a checkpoint without an identity: by its ``data`` section ``before`` and, if they are
    known, the names of its ``classes``.
    """
    after = config.data.model_dump(mode="json")
    if not DATA_SOURCES.get(config.data.name).may_store:  # tars' images of the model's size were not cut: crop_note
        before = {"crop": _FIRST_CROP, **before}
    elif images.stores_latents:  # of pictures that were cut when the latents were computed
        before = {**before, "crop": after["crop"]}
    values = [(key, before[key], after[key]) for key in _OLD_KEYS if key in before]
    if config.data.condition == "text":
        text = before.get("text", {})
        keys = [key for key in ("encoder", "pooled") if text.get(key) is not None]
        values += [(f"text.{key}", text[key], after["text"][key]) for key in keys]
    changes = [f"data.{key} was {plain_text(old)} and is {plain_text(new)}" for key, old, new in values if old != new]
    return changes if classes is None else [*changes, *_class_changes(classes, images.classes)]


def crop_note(before: Mapping[str, Any], config: RunConfig, images: ImageSet) -> str | None:
    """A note where images in tars may be cropped otherwise than under the ``data`` section ``before`` of a checkpoint
    from before ``data.crop``; those of the model's size are not cropped, which only reading them would show.
    """
    crop = config.data.crop
    same = "crop" in before or crop == _FIRST_CROP or not DATA_SOURCES.get(config.data.name).may_store
    if same or images.stores_latents or cut_before_crop(config.data) is not None:  # else another note says so
        return None
    return (
        f"data.crop: {crop} cuts images of another size than the model's, which the run so far cut by {_FIRST_CROP}; "
        f"data.crop={_FIRST_CROP} goes on with that"
    )
