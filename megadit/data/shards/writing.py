"""Samples into tars: ``make_shards`` writes a set, ``SetWriter`` tars of a bounded size, each of which appears whole.

A set that was cut off is gone on with. Tars are the same bytes whoever writes them and when: members have no owner and
no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megadit.config import DataConfig
from megadit.data.build import load_unsplit
from megadit.data.dataset import ImageSet, Subset, print_remarks
from megadit.data.shards import members
from megadit.data.shards.index import Entry, build_index, save_index, scan
from megadit.data.shards.manifest import Manifest, ShardFacts, save_manifest, sha256_of
from megadit.data.shards.shard_files import (
    CAPTION,
    INDEX,
    JSON,
    LABEL,
    MANIFEST,
    RECIPE,
    Progress,
    ShardFile,
    Sharding,
    shard_name,
)
from megadit.data.verify import check_captions, check_files
from megadit.errors import UserError
from megadit.files.ownership import acquire_folder, is_lock_file, refuse_folder_in_use
from megadit.files.paths import atomic_write
from megadit.files.text import json_bytes

_HEADER = 512  # of a member in a tar


class SetWriter:
    """Writes a set of tars into ``folder``; ``done`` samples are there already, of an earlier start that was cut off.

    The folder is this writer's, and no other process's, until ``finish`` or ``abandon``.

    prefix: of the tars' names.  per_shard: the most samples of a tar.  max_bytes: a tar that would grow beyond it ends
    before.  recipe: all that decides what is written; an unfinished set of another recipe is not gone on with.

    Raises UserError if the folder holds anything else, cannot be written, or is another writer's (FolderInUse).
    """

    def __init__(
        self, folder: Path, prefix: str, *, per_shard: int, max_bytes: int | None, recipe: Mapping[str, Any]
    ) -> None:
        self.folder, self.prefix, self.per_shard, self.max_bytes = folder, prefix, per_shard, max_bytes
        self._entries: list[list[Entry]] = []
        self._facts: list[ShardFacts] = []
        self._shard: _Shard | None = None
        self._ownership = acquire_folder(folder, "writing tars")
        with self._writing():
            _begin(folder, {**recipe, "prefix": prefix, "per_shard": per_shard, "max_bytes": max_bytes})
            self._take_over()

    @property
    def done(self) -> int:
        """Samples in finished tars."""
        return sum(len(entries) for entries in self._entries)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """The next sample: its members by extension."""
        size = sum(_HEADER + len(data) + -len(data) % _HEADER for data in members.values())
        shard = self._shard
        if shard is not None and (
            shard.samples >= self.per_shard or (self.max_bytes is not None and shard.size + size > self.max_bytes)
        ):
            self._finish_shard()
        with self._writing():
            if self._shard is None:
                self._shard = _Shard(self.folder / shard_name(self.prefix, len(self._facts)), self._ownership.token)
            self._shard.add(key, members)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the index and then the manifest, which is ``manifest`` with the tars filled in and is returned."""
        if self._shard is not None:
            self._finish_shard()
        with self._writing():
            self._ownership.check()
            save_index(build_index(self._entries, manifest.classes), self.folder / INDEX)
            whole = replace(manifest, shards=tuple(self._facts), samples=self.done)
            save_manifest(whole, self.folder)
            (self.folder / RECIPE).unlink()
        self._ownership.release()
        return whole

    def abandon(self) -> None:
        """Drop the tar that is being written; finished ones stay for the next start, which may begin now."""
        if self._shard is not None:
            self._shard.drop()
            self._shard = None
        self._ownership.release()

    def _take_over(self) -> None:
        for path in self.folder.glob(".*.part"):
            if self._ownership.sure:  # else a writer that was silent may still be at it
                path.unlink()
        while (path := self.folder / shard_name(self.prefix, len(self._facts))).is_file():
            self._note(path, sha256_of(path))

    def _finish_shard(self) -> None:
        assert self._shard is not None
        with self._writing():
            self._ownership.check()
            path, digest = self._shard.finish()
        self._shard = None
        self._note(path, digest)

    def _note(self, path: Path, digest: str) -> None:
        shard = ShardFile.of(path)
        entries = scan(shard)
        self._entries.append(entries)
        self._facts.append(ShardFacts(path.name, len(entries), shard.size, digest))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            self.abandon()
            raise
        except OSError as error:
            self.abandon()
            raise UserError(
                f"--out: '{self.folder}' cannot be written ({error.strerror or error}); make room, or choose another "
                "folder; the same command goes on with what is finished"
            ) from error


def _begin(folder: Path, recipe: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        raise UserError(f"--out: '{folder}' holds a finished set; choose another folder, or remove it")
    text = json_bytes(json.dumps(recipe, sort_keys=True, indent=1, ensure_ascii=False))
    own = folder / RECIPE
    if own.is_file():
        if own.read_bytes() != text:
            raise UserError(
                f"--out: '{folder}' holds a set that another command began; give the same command to go on with it, "
                "choose another folder, or remove it"
            )
    elif any(not is_lock_file(path.name) for path in folder.iterdir()):
        raise UserError(f"--out: '{folder}' is not empty; choose another folder")
    else:
        with atomic_write(own) as temporary:
            temporary.write_bytes(text)


class _Shard:
    """One tar under a temporary name, which no other writer uses."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.samples = path, 0
        self._part = path.with_name(f".{path.name}.{token}.part")
        self._file = _Hashed(open(self._part, "wb"))  # noqa: SIM115 - closed by finish or drop
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def finish(self) -> tuple[Path, str]:
        """Give it its name; returns the path and the SHA-256."""
        self._tar.close()
        self._file.flush()
        self._file.close()
        os.replace(self._part, self.path)
        return self.path, self._file.digest.hexdigest()

    def drop(self) -> None:
        self._file.close(sync=False)
        self._part.unlink(missing_ok=True)


class _Hashed:
    """A file that is only appended to, and its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self._written = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._written += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self._file.flush()

    def close(self, *, sync: bool = True) -> None:
        with contextlib.closing(self._file):
            if sync:
                os.fsync(self._file.fileno())


def set_to_write(config: DataConfig, folder: Path) -> tuple[Subset, list[str]]:
    """The whole set of ``config`` and its base names, looked at before any of it is written into ``folder``.

    Raises UserError as ``build_datasets`` does, where another process owns the folder, or for files or captions that
    are missing.
    """
    refuse_folder_in_use(folder)
    images, bases = load_unsplit(config)
    print_remarks(images)
    check_files(images)
    if config.condition == "text":
        check_captions(config.max_missing_captions, images)
    return images, bases


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
    images, bases = set_to_write(config, folder)
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
