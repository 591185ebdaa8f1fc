"""Where the parts of a diffusers pipeline lie, and what its ``model_index.json`` says of them.

A transformer's folder alone (``config.json`` and its weights) is one too. A folder that is neither is refused with
what it seems to be: a pipeline of a UNet, a cache of the Hugging Face hub, the folder around the one that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.files.folder_kind import broken_link, snapshot_of
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion.key_maps import listed

INDEX, CONFIG = "model_index.json", "config.json"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
SCHEDULER_CONFIG = "scheduler_config.json"
SIGMA = "PixArtSigmaPipeline"
_COPY = "copy the whole folder again"
_WANTED = "give a pipeline folder, or a transformer's folder"
# Components that make no part of the computation of a transformer here, or stay with the user.
_USUAL = ("tokenizer", "text_encoder", "feature_extractor", "image_encoder", "safety_checker")
_MOST_DIGITS = 10  # of a label


@dataclass(frozen=True)
class Pipeline:
    """folder: of all.  transformer: its folder, the same one where it stands alone.  index: None there."""

    folder: Path
    transformer: Path
    index: Fields | None = None

    @property
    def name(self) -> str:
        """Class of the pipeline; empty for a transformer alone."""
        return "" if self.index is None else self.index.text("_class_name", "")

    def component(self, key: str) -> str | None:
        """Class of a component; None where the pipeline has none. Raises UserError for an entry that says neither."""
        if self.index is None:
            return None
        entry = self.index.raw(key)
        if entry is None:
            return None
        if isinstance(entry, list | tuple) and len(entry) == 2:
            library, name = entry
            if library is None and name is None:
                return None
            if isinstance(library, str) and isinstance(name, str):
                return name
        raise self.index.refused(key, entry, "a library and a class, or two nulls")

    def config_of(self, key: str, file: str) -> Fields | None:
        """The configuration of a component that the index names; None where it names none.

        Raises:
            UserError: it is named and not there, or cannot be read.
        """
        name = self.component(key)
        if name is None:
            return None
        path = self.folder / key / file
        broken = broken_link(path)
        if broken is not None:
            raise UserError(f"IN: '{path}' {broken}")
        if not path.is_file():
            raise UserError(
                f"IN: '{path}' is missing, though {INDEX} names a {name}; {_COPY}, or give its folder {TRANSFORMER} "
                "alone"
            )
        return Fields.of_file(path, "IN", _COPY)


def find_pipeline(path: Path) -> Pipeline:
    """The pipeline, or the transformer alone, at ``path``.

    Raises:
        UserError: it is neither; with what it seems to be, and the folder that may be meant.
    """
    if not path.is_dir():
        raise UserError(f"IN: '{path}' is a file, and diffusers keeps a model in a folder; {_WANTED}")
    if not (path / INDEX).is_file():
        if (path / CONFIG).is_file():
            return Pipeline(path, path)
        raise UserError(f"IN: '{path}' {_seems(path)}")
    index = Fields.of_file(path / INDEX, "IN", _COPY)
    pipeline = Pipeline(path, path / TRANSFORMER, index)
    if pipeline.component(TRANSFORMER) is None:
        if pipeline.component("unet") is not None:
            raise UserError(f"{index.where} is of a {pipeline.name}, whose model is a UNet; {_no_unet()}")
        raise UserError(f"{index.where} names no {TRANSFORMER}, so that there is no model to read; {_WANTED}")
    if not pipeline.transformer.is_dir():
        raise UserError(f"IN: '{pipeline.transformer}' is missing, though {INDEX} names it; {_COPY}")
    return pipeline


def class_names(pipeline: Pipeline, count: int) -> tuple[tuple[str, ...], list[str]]:
    """Names by label of a model of ``count`` classes, where the pipeline has all of them, and what is to be said.

    Raises:
        UserError: a label is no whole number or is there twice, or a name is no text.
    """
    index = pipeline.index
    if index is None or "id2label" not in index:
        return (), []
    section = index.section("id2label", null=True)
    names: dict[int, str] = {}
    for key in section.names():
        if not (key.isascii() and key.isdecimal() and len(key) <= _MOST_DIGITS):
            raise UserError(
                f"{section.where} has the label {shown(key)}, which must be a whole number; correct the file"
            )
        if int(key) in names:
            raise UserError(f"{section.where} has the label {int(key)} twice ({shown(key)}); keep one")
        names[int(key)] = section.text(key)
    if not names:
        return (), []
    beyond = [label for label in names if label >= count]
    missing = count - (len(names) - len(beyond))
    notes = []
    if beyond:
        notes.append(f"id2label names labels to {max(names)}, the model has {count} classes: those above are left out")
    if missing:
        notes.append(f"id2label has no name for {missing} of the model's {count} classes: all names are left out")
        return (), notes
    return tuple(names[label] for label in range(count)), notes


def left_out(pipeline: Pipeline) -> list[str]:
    """A note on components that a model here does not have."""
    if pipeline.index is None:
        return []
    known = (TRANSFORMER, SCHEDULER, VAE, "id2label", *_USUAL)
    others = [
        f"{key} ({value[1]})"
        for key, value in _components(pipeline.index)
        if not any(key == name or key.startswith(f"{name}_") for name in known)
    ]
    return [f"of the {pipeline.name} are left out: {listed(others)}"] if others else []


def _components(index: Fields) -> Iterator[tuple[str, list[Any]]]:
    for key in index.names():
        value = index.raw(key)
        if key[:1] != "_" and isinstance(value, list) and len(value) == 2 and value[1] is not None:
            yield key, value


def _no_unet() -> str:
    return "models here are Transformers: DiT, PixArt, or Stable Diffusion 3's"


def _seems(path: Path) -> str:
    """What a folder without a configuration seems to be, and the remedy."""
    cache = snapshot_of(path)
    if cache is not None:
        return cache
    for file in (INDEX, CONFIG):
        broken = broken_link(path / file)
        if broken is not None:
            return f"holds {file}, which {broken}"
    if (path / "unet").is_dir():
        return f"has a UNet and no {INDEX}; {_no_unet()}"
    if (path / TRANSFORMER / CONFIG).is_file():
        return f"has a folder {TRANSFORMER} and no {INDEX}; {_COPY}, or give '{path / TRANSFORMER}' alone"
    inner = sorted(file.parent for name in (INDEX, CONFIG) for file in path.glob(f"*/{name}"))
    if inner:
        return f"holds neither {INDEX} nor {CONFIG}, but '{inner[0]}' does; give that folder"
    return f"holds neither {INDEX} nor {CONFIG}; {_WANTED}"
