"""From a set to tars: what ``tools/make_shards.py`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megadit.config import DataConfig
from megadit.data.build import whole_set
from megadit.data.captions import check_captions
from megadit.data.dataset import ImageSet, tell_remarks
from megadit.data.shards import members
from megadit.data.shards.layout import CAPTION, JSON, LABEL, Progress, Sharding
from megadit.data.shards.manifest import Manifest
from megadit.data.shards.writing import SetWriter
from megadit.data.verify import check_files
from megadit.errors import UserError
from megadit.files.ownership import refuse_occupied


def make_shards(
    config: DataConfig,
    folder: Path,
    sharding: Sharding,
    image: Literal["png", "jpg"] = "png",
    quality: int = 95,
    progress: Progress | None = None,
) -> Manifest:
    """Write the whole set of ``config`` (nothing held out: base names travel along) as images, captions and labels.

    A start that was cut off is gone on with. Raises UserError as ``build_datasets`` and ``SetWriter`` do.
    """
    refuse_occupied(folder)
    images, bases = whole_set(config)
    tell_remarks(images)
    check_files(images)
    if config.condition == "text":
        check_captions(config.max_missing_captions, images)
    if images.stores_latents:
        raise UserError(f"data.path: {config.path} holds latents, from which no images can be written; give images")
    made = {"command": "make_shards", "data": settings(config), "image": image, "quality": quality}
    writer = set_writer(folder, sharding, made)
    try:
        for i in range(writer.done, len(images)):
            picture: dict[str, bytes] = {image: members.write_picture(images.image(i), image, quality)}
            writer.add(key_of(i), {**picture, **words(images, bases, i)})
            if progress is not None:
                progress(i + 1, len(images))
    except BaseException:
        writer.abandon()
        raise
    return writer.finish(facts_of(images, made))


def settings(config: DataConfig) -> dict[str, Any]:
    """The data section as the manifest keeps it: without what is about runs, or only refuses."""
    exclude = {"on_change", "on_corrupt", "max_missing_captions"}
    return config.model_dump(mode="json", exclude=exclude if config.options else {*exclude, "options"})


def set_writer(folder: Path, sharding: Sharding, made: dict[str, Any]) -> SetWriter:
    """The writer of a set that is cut as ``sharding`` says and made with the settings ``made``. Raises UserError."""
    per_shard, most = sharding.per_shard, sharding.max_bytes
    return SetWriter(folder, sharding.prefix, per_shard=per_shard, max_bytes=most, recipe=recipe_of(made))


def recipe_of(made: dict[str, Any]) -> dict[str, Any]:
    """What decides the contents, of the settings ``made``: all, but for a default ``data.crop``.

    So sets that were begun before that was a key are gone on with.
    """
    data = dict(made["data"])
    if data["crop"] == DataConfig.model_fields["crop"].default:
        del data["crop"]
    return {**made, "data": data}


def key_of(i: int) -> str:
    """The key of sample i."""
    return f"{i:08d}"


def words(images: ImageSet, bases: list[str], i: int) -> dict[str, bytes]:
    """The members of sample i that say what it shows: json, txt, and cls where there are classes."""
    caption = images.caption(i)
    facts: dict[str, Any] = {"caption": caption, "base": bases[i]}
    if images.classes:
        facts |= {"label": images.label(i), "class": images.classes[images.label(i)]}
    found = {JSON: members.write_json(facts), CAPTION: caption.encode()}
    return {**found, LABEL: str(images.label(i)).encode()} if images.classes else found


def facts_of(images: ImageSet, made: dict[str, Any]) -> Manifest:
    """The manifest of a set whose tars are still to be told."""
    return Manifest(
        name=images.name,
        samples=len(images),
        classes=images.classes,
        channels=images.channels,
        image_size=images.image_size,
        notice=images.notice,
        shards=(),
        made=made,
    )
