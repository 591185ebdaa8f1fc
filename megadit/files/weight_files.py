"""Which files of a folder hold the weights, and which tensor is to lie in which: shards, their index, and variants.

Names, as the Hugging Face libraries have them: ``model.safetensors``, ``model-00001-of-00002.safetensors`` with the
index ``model.safetensors.index.json``, and the same of a variant such as fp16: ``model.fp16.safetensors``,
``model.fp16-00001-of-00002.safetensors`` or ``model-00001-of-00002.fp16.safetensors``, and
``model.safetensors.index.fp16.json``. The index decides: what it says and what the shards hold must agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.folder_kind import broken_link
from megadit.files.json_fields import shown
from megadit.files.json_text import JsonError, parse_json
from megadit.files.paths import is_file_name

if TYPE_CHECKING:
    from torch import Tensor

_MOST_INDEX = 100_000_000  # bytes; SD3's has 0.1 MB
_INDEX = re.compile(r"(?P<head>.+)\.index(?:\.(?P<variant>\w+))?\.json")
_SHOWN = 5  # names or numbers that a sentence lists
_NUMBERED = r"(?:-(?P<{0}>[0-9]+)-of-(?P<{0}_of>[0-9]+))?"
_NAME = re.compile(rf"(?P<stem>.+?){_NUMBERED.format('a')}(?:\.(?P<variant>[A-Za-z]\w*))?{_NUMBERED.format('b')}")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one set of weights. ``weight_map`` says which tensor lies in which, where there is an index.

    ``total`` is the number of bytes that the index says; ``notes`` are for people.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None
    total: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _WeightSet:
    """One set of weights in a folder: a file, the shards ``i of n`` by number, or an index of them."""

    stem: str
    variant: str | None
    file: Path | None = None
    index: Path | None = None
    shards: Mapping[int, Path] | None = None
    count: int = 0

    @property
    def first(self) -> Path:
        """The file that stands for the set."""
        return self.file or self.index or (self.shards or {})[min(self.shards or {})]

    @property
    def priority(self) -> tuple[bool, int]:
        """What is taken of several of one name: the least, without a variant, by its index, the file, the shards."""
        return self.variant is not None, 0 if self.index else 1 if self.file else 2


def find_weights(path: Path, stem: str, endings: Sequence[str], others: str) -> WeightFiles | None:
    """The weights at ``path``: a file, an index file, or what a folder holds; None if it has no such file.

    ``stem``: the usual name, which goes before others; ``others`` what to do where several sets lie there.

    Raises:
        UserError: a set is not complete, an index is none or names what is not there, or several sets are there.
    """
    endings = tuple(endings)
    if path.is_file():
        if _index_head(path.name, endings):
            return _indexed(path, endings)
        part = _NAME.fullmatch(_without_ending(path.name, endings) or "")
        number, count = (part["a"] or part["b"], part["a_of"] or part["b_of"]) if part else (None, None)
        if number is not None and int(count or 0) > 1:
            raise UserError(
                f"IN: '{path}' is shard {int(number)} of {int(count or 0)} and not the whole; give the folder of all "
                "shards, or their index"
            )
        return WeightFiles((path,)) if path.name.endswith(endings) else None
    sets = _in_folder(path, endings)
    usual = sorted((each for each in sets if each.stem == stem), key=lambda each: each.priority)
    candidates = usual or [each for each in sets if each.index] or sets
    if not candidates:
        return None
    rivals = [each for each in candidates if each.priority == candidates[0].priority] if usual else candidates
    if len(rivals) > 1:
        names = _listed([each.first.name for each in rivals])
        problem = f"several indices ({names})" if rivals[0].index else f"several files ({names}) and no index"
        raise UserError(f"IN: '{path}' holds {problem}; {others}")
    chosen = candidates[0] if candidates[0].index else _index_of(path, candidates[0], sets) or candidates[0]
    result = _indexed(chosen.index, endings) if chosen.index else _unindexed(chosen)
    others_there = [each for each in sets if each is not chosen and (chosen.index or each.stem == chosen.stem)]
    left = {each.first for each in others_there} - set(result.files)
    if not left:
        return result
    aside = _listed([file.name for file in left])
    note = f"of the weights in '{path}', {chosen.first.name} is taken; left aside: {aside}"
    return WeightFiles(result.files, result.weight_map, result.index, result.total, (*result.notes, note))


def _index_of(folder: Path, chosen: _WeightSet, sets: Sequence[_WeightSet]) -> _WeightSet | None:
    """The index, whatever it is called, that names the shards of ``chosen``; None if there is none.

    Raises:
        UserError: there are several.
    """
    names = [file.name.encode() for file in (chosen.shards or {}).values()]
    owners = [each for each in sets if each.index and names and _mentions(each.index, names)]
    if len(owners) > 1:
        indices = _listed([each.first.name for each in owners])
        raise UserError(
            f"IN: '{folder}' holds several indices of the same shards ({indices}); give the one that is meant"
        )
    return owners[0] if owners else None


def _mentions(index: Path, names: Sequence[bytes]) -> bool:
    """Whether a file has one of ``names`` in its text, a valid index or not, which is checked elsewhere."""
    try:
        with open(index, "rb") as file:
            text = file.read(_MOST_INDEX)
    except OSError:
        return False
    return any(name in text for name in names)


def _in_folder(folder: Path, endings: tuple[str, ...]) -> list[_WeightSet]:
    """All sets of weights in a folder, by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    sets: list[_WeightSet] = []
    shards: dict[tuple[str, str | None, int, str], dict[int, Path]] = {}
    for name in names:
        head = _index_head(name, endings)
        if head:
            sets.append(_WeightSet(*head, index=folder / name))
            continue
        bare = _without_ending(name, endings)
        part = None if bare is None else _NAME.fullmatch(bare)
        if bare is None or part is None:
            continue
        number, count = part["a"] or part["b"], part["a_of"] or part["b_of"]
        if number is None or (part["a"] and part["b"]):
            sets.append(_WeightSet(part["stem"], part["variant"], file=folder / name))
            continue
        key = part["stem"], part["variant"], int(count), name[len(bare) :]
        shards.setdefault(key, {})[int(number)] = folder / name
    sets += [_WeightSet(stem, kind, shards=files, count=n) for (stem, kind, n, _), files in shards.items()]
    return sets


def _index_head(name: str, endings: tuple[str, ...]) -> tuple[str, str | None] | None:
    """(stem, variant) of the weights that a file called so is the index of; None for another file."""
    match = _INDEX.fullmatch(name)
    stem = None if match is None else _without_ending(match["head"], endings)
    return None if match is None or not stem else (stem, match["variant"])


def _without_ending(name: str, endings: tuple[str, ...]) -> str | None:
    ending = next((each for each in endings if name.endswith(each)), None)
    return None if ending is None else name.removesuffix(ending)


def _unindexed(weights: _WeightSet) -> WeightFiles:
    """A file, or shards whose names alone say which there are."""
    if weights.file is not None:
        return WeightFiles((weights.file,))
    shards = weights.shards or {}
    missing = (number for number in range(1, weights.count + 1) if number not in shards)
    first_missing = list(islice(missing, _SHOWN))
    if first_missing or len(shards) != weights.count:
        numbers = ", ".join(map(str, first_missing)) + (", …" if len(first_missing) == _SHOWN else "")
        problem = f"missing is number {numbers}" if first_missing else f"there are {len(shards)}"
        raise UserError(f"IN: '{weights.first}' is one of {weights.count} shards: {problem}; copy all shards")
    files = tuple(shards[number] for number in sorted(shards))
    return WeightFiles(files, notes=(f"the shards have no index: all {len(files)} that their names count are read",))


def _indexed(index: Path, endings: tuple[str, ...]) -> WeightFiles:
    weight_map, total = read_index(index, endings)
    names = sorted(set(weight_map.values()))
    named = [_NAME.fullmatch(_without_ending(name, endings) or "") for name in names]
    parts = [part for part in named if part is not None and (part["a"] or part["b"])]
    series = {(part["stem"], part["variant"], int(part["a_of"] or part["b_of"])) for part in parts}
    sets = _in_folder(index.parent, endings)
    # Those of the series that the index passes over are opened too, so that the tensors in them can be named.
    present = [each.shards or {} for each in sets if (each.stem, each.variant, each.count) in series]
    names += sorted({file.name for shards in present for file in shards.values()} - set(names))
    return WeightFiles(tuple(index.parent / name for name in names), weight_map, index, total)


def read_index(index: Path, endings: Sequence[str]) -> tuple[dict[str, str], Any]:
    """``weight_map`` of an index, tensors to names of files that are there; and what it says of the bytes, if it does.

    Raises:
        UserError: it is no index, or names something else than files of its own folder with one of ``endings``.
    """
    try:
        broken = broken_link(index)
        if broken is not None:
            raise UserError(f"{index}: {broken}")
        if not index.is_file():
            raise UserError(f"{index}: is no regular file; give the index of the shards")
        if index.stat().st_size > _MOST_INDEX:
            raise UserError(f"{index}: has {index.stat().st_size:,} bytes, which no index of shards has; copy it again")
        values = parse_json(index.read_bytes())
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror or error}); copy it again") from error
    except JsonError as error:
        other = file_instead(index, "json", "text")
        raise UserError(f"{index}: is no index of shards: {other or f'it {error}; copy it again'}") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: is no index of shards: it has no weight_map of tensors and files; copy it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_file_name(name):
            raise UserError(
                f"{index}: weight_map puts '{tensor}' into {shown(name)}, which is no name of a file beside the index; "
                "a shard is never looked for elsewhere: copy the index and the shards again"
            )
        if not name.endswith(tuple(endings)):
            raise UserError(
                f"{index}: weight_map puts '{tensor}' into {name}, which is no {' or '.join(endings)} file; give the "
                "index that belongs to the shards"
            )
    for name in sorted(set(weight_map.values())):
        _check_shard_exists(index, name)
    metadata = values.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def check_indices(folder: Path, *endings: str) -> None:
    """Refuse a folder with an index that names something else than files in it, before another library follows it.

    Raises:
        UserError: as ``read_index`` does.
    """
    for name in sorted(os.listdir(folder)):
        if _index_head(name, endings):
            read_index(folder / name, endings)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_shard_exists(index: Path, name: str) -> None:
    file = index.parent / name
    if file.is_file():  # or a link to one, as in the hub's cache
        return
    broken = broken_link(file)
    if broken is not None:
        raise UserError(f"{file}: {broken}; {index.name} names it as a shard")
    if file.exists():
        raise UserError(f"{file}: is no regular file, though {index.name} names it as a shard; copy the shard again")
    raise UserError(f"{file}: is missing, though {index.name} names it; copy all shards")


def join_shards(
    files: WeightFiles, shards: Sequence[tuple[Path, Mapping[str, Tensor]]]
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of the shards, which must be where the index says; and what people should know.

    Raises:
        UserError: a tensor lies in several shards, in another than the index names, in none, or the index lacks it.
    """
    where: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    for file, held in shards:
        for name, value in held.items():
            if name in where:
                raise UserError(
                    f"{file}: holds '{name}', which {where[name].name} holds too; a tensor has one shard: copy all "
                    "shards of one checkpoint"
                )
            where[name], tensors[name] = file, value
    notes = list(files.notes)
    if files.weight_map is None or files.index is None:
        return tensors, notes
    for name, shard in files.weight_map.items():
        if name not in where:
            raise UserError(
                f"{files.index.parent / shard}: does not hold '{name}', though {files.index.name} says so, nor does "
                "another shard; copy all shards again"
            )
        if where[name].name != shard:
            raise UserError(
                f"{where[name]}: holds '{name}', though {files.index.name} says that it lies in {shard}; copy the "
                "index and the shards of one checkpoint"
            )
    unnamed = next((name for name in where if name not in files.weight_map), None)
    if unnamed is not None:
        raise UserError(
            f"{where[unnamed]}: holds '{unnamed}', which {files.index.name} does not name; copy the index that belongs "
            "to the shards, or take the file away where it is of another set"
        )
    size = sum(value.nbytes for value in tensors.values())
    if files.total is not None and files.total != size:
        notes.append(
            f"{files.index.name} says total_size {shown(files.total)}, but its tensors have {size} bytes; all that it "
            "names are there"
        )
    return tensors, notes
