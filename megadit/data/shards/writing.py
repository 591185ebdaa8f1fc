"""Samples into tars: ``make_shards`` writes a set, ``SetWriter`` tars of a bounded size, each of which appears whole.

An interrupted set is resumed after its last whole tar. The bytes of a tar do not depend on who writes it and when:
members have no owner and no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megadit.config import DataConfig
from megadit.data.build import load_unsplit
from megadit.data.dataset import ImageSet, ProgressCallback, Subset, print_remarks
from megadit.data.shards import members, naming
from megadit.data.shards.index import TarSample, build_index, save_index, scan
from megadit.data.shards.manifest import Manifest, ShardFacts, save_manifest, sha256_of
from megadit.data.shards.naming import MANIFEST, RECIPE, Sharding, shard_name
from megadit.data.shards.shard_files import ShardFile
from megadit.data.verify import check_captions, check_files
from megadit.errors import UserError
from megadit.files.ownership import acquire_folder, is_lock_file, refuse_folder_in_use
from megadit.files.paths import atomic_write, refuse_unwritable
from megadit.files.text import json_bytes

_BLOCK = 512  # bytes of a member's header; data are padded to a multiple of it


class SetWriter:
    """Writes a set of tars into ``folder``; ``done`` samples are there already, of an interrupted start.

    The folder is this writer's, and no other process's, until ``finish`` or ``abandon``; an exception in its ``with``
    block abandons it.

    recipe: all that decides what is written beside ``sharding``; an unfinished set of another recipe is not resumed.

    Raises UserError if the folder holds anything else, cannot be written, or is another writer's (FolderInUse).
    """

    def __init__(self, folder: Path, sharding: Sharding, recipe: Mapping[str, Any]) -> None:
        self.folder, self.sharding = folder, sharding
        self._samples: list[list[TarSample]] = []  # by finished tar
        self._facts: list[ShardFacts] = []
        self._shard: _ShardWriter | None = None
        self._ownership = acquire_folder(folder, "writing tars")
        with self._writing():
            _prepare_folder(folder, {**recipe, **asdict(sharding)})
            self._resume()

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.abandon()

    @property
    def done(self) -> int:
        """The number of samples in finished tars."""
        return sum(map(len, self._samples))

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write the next sample: its members by extension."""
        size = sum(_BLOCK + len(data) + -len(data) % _BLOCK for data in members.values())
        shard, most = self._shard, self.sharding
        if shard is not None and (
            shard.samples >= most.per_shard or (most.max_bytes is not None and shard.size + size > most.max_bytes)
        ):
            self._finish_shard()
        with self._writing():
            if self._shard is None:
                self._shard = _ShardWriter(self._next_path(), self._ownership.token)
            self._shard.add(key, members)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the index, then the manifest: ``manifest`` with the tars filled in, which is returned."""
        if self._shard is not None:
            self._finish_shard()
        with self._writing():
            self._ownership.check()
            save_index(build_index(self._samples, manifest.classes), self.folder / naming.INDEX)
            manifest = replace(manifest, shards=tuple(self._facts), samples=self.done)
            save_manifest(manifest, self.folder)
            (self.folder / RECIPE).unlink()
        self._ownership.release()
        return manifest

    def abandon(self) -> None:
        """Delete the tar that is being written, and release the folder; finished tars stay for the next start."""
        if self._shard is not None:
            self._shard.drop()
            self._shard = None
        self._ownership.release()

    def _resume(self) -> None:
        """Delete unfinished tars of an earlier writer, and register the finished ones."""
        for path in self.folder.glob(".*.part"):
            if self._ownership.sure:  # else a writer that was silent may still use it
                path.unlink()
        while (path := self._next_path()).is_file():
            self._register(path, sha256_of(path))

    def _next_path(self) -> Path:
        return self.folder / shard_name(self.sharding.prefix, len(self._facts))

    def _finish_shard(self) -> None:
        assert self._shard is not None
        with self._writing():
            self._ownership.check()
            path, digest = self._shard.finish()
        self._shard = None
        self._register(path, digest)

    def _register(self, path: Path, digest: str) -> None:
        shard = ShardFile.of(path)
        samples = scan(shard)
        self._samples.append(samples)
        self._facts.append(ShardFacts(path.name, len(samples), shard.size, digest))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        remedy = "make room, or choose another folder; the same command goes on with what is finished"
        try:
            with refuse_unwritable("--out", self.folder, remedy):
                yield
        except UserError:
            self.abandon()
            raise


def _prepare_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Make the folder, with its recipe. Raises UserError where it holds a finished set, another one, or other files."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        raise UserError(f"--out: '{folder}' holds a finished set; choose another folder, or remove it")
    text = json_bytes(json.dumps(recipe, sort_keys=True, indent=1, ensure_ascii=False))
    file = folder / RECIPE
    if file.is_file():
        if file.read_bytes() != text:
            raise UserError(
                f"--out: '{folder}' holds a set that another command began; give the same command to go on with it, "
                "choose another folder, or remove it"
            )
    elif any(not is_lock_file(path.name) for path in folder.iterdir()):
        raise UserError(f"--out: '{folder}' is not empty; choose another folder")
    else:
        with atomic_write(file) as temporary:
            temporary.write_bytes(text)


class _ShardWriter:
    """Writes one tar under a temporary name, which no other writer uses."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.samples = path, 0
        self._part = path.with_name(f".{path.name}.{token}.part")
        self._file = _HashedFile(open(self._part, "wb"))  # noqa: SIM115 - closed by finish or drop
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


class _HashedFile:
    """A file that is only appended to, with its SHA-256."""

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
    """All images of ``config`` and their base names, checked before any is written into ``folder``.

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
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write the whole set of ``config`` as images, captions, labels and base names, by which a run splits it.

    An interrupted set is resumed. Raises UserError as ``build_datasets`` and ``SetWriter`` do.
    """
    images, bases = set_to_write(config, folder)
    if images.stores_latents:
        raise UserError(f"data.path: {config.path} holds latents, from which no images can be written; give images")
    made = {"command": "make_shards", "data": data_settings(config), "image": image, "quality": quality}
    with SetWriter(folder, sharding, recipe_of(made)) as writer:
        for i in range(writer.done, len(images)):
            picture: dict[str, bytes] = {image: members.write_picture(images.image(i), image, quality)}
            writer.add(sample_key(i), {**picture, **text_members(images, bases, i)})
            if progress is not None:
                progress(i + 1, len(images))
        return writer.finish(new_manifest(images, made))


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The data section as the manifest stores it: without keys that concern runs, or only refuse."""
    exclude = {"on_change", "on_corrupt", "max_missing_captions"}
    return config.model_dump(mode="json", exclude=exclude if config.options else {*exclude, "options"})


def recipe_of(made: dict[str, Any]) -> dict[str, Any]:
    """The settings ``made`` of a command without a default ``data.crop``.

    So sets are resumed that were begun before that key existed.
    """
    data = dict(made["data"])
    if data["crop"] == DataConfig.model_fields["crop"].default:
        del data["crop"]
    return {**made, "data": data}


def sample_key(i: int) -> str:
    """The key of sample i."""
    return f"{i:08d}"


def text_members(images: ImageSet, bases: list[str], i: int) -> dict[str, bytes]:
    """The members of sample i with caption, label and base name: json, txt, and cls where there are classes."""
    caption = images.caption(i)
    values: dict[str, Any] = {"caption": caption, "base": bases[i]}
    texts = {naming.JSON: b"", naming.CAPTION: caption.encode()}
    if images.classes:
        label = images.label(i)
        values |= {"label": label, "class": images.classes[label]}
        texts[naming.LABEL] = str(label).encode()
    return {**texts, naming.JSON: members.write_json(values)}


def new_manifest(images: ImageSet, made: dict[str, Any]) -> Manifest:
    """The manifest of a set whose tars are not yet known."""
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
