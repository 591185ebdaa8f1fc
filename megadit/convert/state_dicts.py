"""Whole weights by name: safetensors files, and the torch files that ``zero_to_fp32`` writes; one file or shards.

Shards come with an index file (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``) that maps names to
files, as the Hugging Face hub's loaders know it. Safetensors files that are written here hold the run's configuration
among their metadata, so that the model can be rebuilt from them alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megadit.config import RunConfig
from megadit.config.family import families
from megadit.convert.contents import Contents, ValueCheck
from megadit.convert.deferred import loaded
from megadit.convert.parameter_names import plain_weights, prefixes_of
from megadit.convert.request import Request
from megadit.convert.safetensors_file import SafetensorsFile
from megadit.convert.torch_files.safe_load import load_deferred
from megadit.convert.torch_files.write import save_streaming
from megadit.errors import UserError, say
from megadit.files.file_kind import instead, kind_of_file
from megadit.files.folder_kind import folder_instead
from megadit.files.paths import safetensors_header
from megadit.files.weight_files import WeightFiles, find_weights, join_shards
from megadit.plugins import plugin_changes, plugin_records, require_imported

SHARD_BYTES = 5 * 10**9  # zero_to_fp32's own limit
_BYTES = 4  # float32
_Writer = Callable[[Path, Mapping[str, Tensor]], None]
_TORCH = ("pytorch_model", (".bin", ".pt", ".pth"))  # the usual name, and endings
_SAFE = ("model", (".safetensors",))
_NAME_ONE = "name one of them"
_CONFIG_KEY = "megadit_config"  # of a safetensors file's metadata: the run's configuration as JSON


def read_safetensors(path: Path, request: Request, check: ValueCheck) -> Contents:
    """The weights in a safetensors file, or in a folder of one or several; the request's ``--ema`` is a prefix.

    Raises:
        UserError: none is there, it is broken, shards and their index do not agree, or which of two models is meant is
            not clear.
    """
    files = find_weights(path, *_SAFE, _NAME_ONE)
    contents = _contents(path, "safetensors", files, request, check)
    assert files is not None  # else there would be no contents
    return replace(contents, config=_config(files.files[0]))


def read_fp32_state_dict(path: Path, request: Request, check: ValueCheck) -> Contents:
    """The weights that zero_to_fp32 wrote, as torch files or with ``--safe_serialization``: a file or a folder.

    Raises:
        UserError: as ``read_safetensors``, or it holds more than tensors by name.
    """
    files = find_weights(path, *_TORCH, _NAME_ONE) or find_weights(path, *_SAFE, _NAME_ONE)
    return _contents(path, "fp32 state dict", files, request, check)


def _contents(path: Path, kind: str, files: WeightFiles | None, request: Request, check: ValueCheck) -> Contents:
    if files is None:
        torch_kinds = ("torch", "old-torch", "safetensors")  # under another ending
        if path.is_dir():
            folder = folder_instead(path)
            other = None if folder is None else f"it {folder}"
        else:
            other = instead(kind_of_file(path), *torch_kinds)
        remedy = "; give the file that holds the weights" if other is None else f": {other}"
        raise UserError(f"IN: '{path}' is no {kind} file and no folder of one{remedy}")
    tensors, file_notes = load_weight_files(files, check)
    family = None if request.config is None else request.config.model.family
    if request.ema is not None and not prefixes_of(tensors, family):
        raise UserError(f"--ema: {request.ema} is asked for, but {kind} holds no averages; leave it out")
    tensors, notes = plain_weights(tensors, f"{kind} '{path}'", request.ema, family)
    notes = [*file_notes, *notes]
    others = [name for name, value in tensors.items() if not value.is_floating_point()]
    if others:
        notes.append(f"{len(others)} tensors of whole numbers were left out ({others[0]}, …)")
    weights = {name: value for name, value in tensors.items() if value.is_floating_point()}
    buffers = [spec.null_caption for spec in families() if spec.null_caption in weights]  # beside the parameters
    extras = {name: weights.pop(name).float() for name in buffers}
    return Contents.of_weights(f"{kind} '{path}'", weights, notes=tuple(notes), extras=extras)


def load_weight_files(files: WeightFiles, check: ValueCheck) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file or of shards by name, deferred and looked at by ``check``; and what people should know.

    Raises:
        UserError: a file cannot be read or holds something else, or shards and index do not agree.
    """
    tensors, notes = join_shards(files, [(file, load_tensors(file)) for file in files.files])
    return check.watched(tensors), notes


def is_sharded(path: Path) -> bool:
    """Whether the path is an index of shards, or a folder that has one."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    return any(".index." in name and name.endswith(".json") for name in names)


def joined_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of shards of any format by name, deferred, and what people should know.

    Raises:
        UserError: a shard is missing or cannot be read, or shards and index do not agree.
    """
    files = find_weights(path, *_SAFE, _NAME_ONE) or find_weights(path, *_TORCH, _NAME_ONE)
    if files is None:
        raise UserError(f"IN: '{path}' holds an index and no weights of a known ending; copy the whole folder")
    return join_shards(files, [(file, load_tensors(file)) for file in files.files])


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors by name in one file of weights alone, deferred.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if file.name.endswith(".safetensors"):
        return SafetensorsFile(file).tensors()
    values = load_deferred(file)
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        held = ", ".join(map(str, list(values)[:4])) if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{file}: holds {held} and not tensors by name; give the weights alone, such as zero_to_fp32 writes them"
        )
    return values


def _config(file: Path) -> RunConfig | None:
    """The configuration among a safetensors file's metadata, if it has one that is valid today."""
    text = SafetensorsFile(file).metadata.get(_CONFIG_KEY)
    try:
        config = None if text is None else json.loads(text)
        plugins = plugin_records(config.get("plugins", [])) if isinstance(config, dict) else []
        require_imported(plugins, str(file))
        for change in plugin_changes(plugins):
            say(f"warning: {change}")
        return None if text is None else RunConfig.model_validate_json(text)
    except (ValueError, RecursionError):  # of another version of megadit; --config can say what it was
        return None


def write_safetensors(contents: Contents, target: Path) -> list[str]:
    """Write float32 weights into one ``….safetensors`` file or, under another name, into a folder of shards."""
    metadata = {} if contents.config is None else {_CONFIG_KEY: contents.config.model_dump_json()}
    return _write(contents, target, ".safetensors", "model", partial(write_one, metadata=metadata))


def write_fp32_state_dict(contents: Contents, target: Path) -> list[str]:
    """Write float32 weights as torch files that ``load_state_dict`` takes: one ``….bin``, or a folder of shards."""
    return _write(contents, target, ".bin", "pytorch_model", lambda path, tensors: save_streaming(dict(tensors), path))


def _write(contents: Contents, target: Path, ending: str, name: str, write: _Writer) -> list[str]:
    if target.name.endswith(ending):
        write(target, contents.state_dict())
    else:
        target.mkdir()
        _sharded_files(target, name, ending, contents.state_dict(), SHARD_BYTES, write)
    return contents.weights_only_notes


def write_one(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write float32 tensors into one safetensors file, deferred ones one by one; two names may share one tensor."""
    with open(path, "wb") as file:
        file.write(safetensors_header({name: value.shape for name, value in tensors.items()}, metadata))
        for value in tensors.values():
            file.write(loaded(value).contiguous().view(-1).view(torch.uint8).numpy().data)


def write_folder(folder: Path, name: str, tensors: Mapping[str, Tensor], limit: int) -> None:
    """Write float32 tensors as ``folder/name.safetensors``, or as shards of ``limit`` bytes with an index."""
    _sharded_files(folder, name, ".safetensors", tensors, limit, write_one)


def _sharded_files(
    folder: Path, name: str, ending: str, tensors: Mapping[str, Tensor], limit: int, write: _Writer
) -> None:
    """One file, or, above ``limit`` bytes, numbered ones and the index of which tensor is in which."""
    shards = list(_shards(tensors, limit))
    if len(shards) == 1:
        write(folder / f"{name}{ending}", tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{name}-{number:05d}-of-{len(shards):05d}{ending}"
        write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.numel() * _BYTES for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{name}{ending}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, in groups of at most ``limit`` bytes (a larger one stands alone)."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors.items():
        bytes_ = value.numel() * _BYTES
        if group and size + bytes_ > limit:
            yield group
            group, size = {}, 0
        group[name] = value
        size += bytes_
    yield group
