"""Where a model's weights stand in what a training program saved, told by names alone; no tensor is read.

Of a folder, one file holds them: U-ViT's ``500000.ckpt`` has ``nnet.pth`` and ``nnet_ema.pth`` beside the optimizer's,
accelerate's folders ``model.safetensors`` or ``pytorch_model.bin``.

A file may hold sets of weights below keys (``state_dict``, ``ema``), beside optimizers and settings. Within a set,
names carry parts of wrappers (``module`` of DDP, ``_orig_mod`` of torch.compile, FSDP's) and the prefix of the
attribute under which a trainer keeps the model (``model.``, ``net.``, ``ema_model.``, ``model.diffusion_model.``).
Prefixes need no list: each family has one parameter whose name ends alike wherever the model stands, its anchor. What
stands before the anchor is a prefix, and its group is the names that begin so. Groups are never merged: which one is
taken is told, and ``--ema`` takes another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.convert.foreign_names import (
    UNNAMED,
    no_names,
    origin_notes,
    refuse_files,
    refuse_kinds,
    refuse_other_models,
)
from megadit.errors import UserError
from megadit.files.folder_kind import folder_instead
from megadit.models.conversion import conversions
from megadit.models.conversion.key_maps import listed

# Parts of names that wrappers put in, before all of it or in the middle. No model here has a module of such a name.
_HIDDEN = (
    "_orig_mod",  # torch.compile
    "_forward_module",  # Lightning Fabric, and its DeepSpeed
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP before torch 2
    "_checkpoint_wrapped_module",
)
_MODULE = "module"  # of DistributedDataParallel, torch's AveragedModel, timm's ModelEmaV2, ema-pytorch
# Keys below which weights stand, the first that is there: those that are trained before their averages.
_TRAINED = ("", "current_model_state", "state_dict", "model", "module", "model_state_dict", "net", "nnet", "network")
_AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "nnet_ema")
_AVERAGE = re.compile(  # in keys, prefixes and names of files
    r"(?:^|[_.-])(?:ema|avg|averaged?|averaging|shadow|slow|swa|polyak|teacher|target)(?:[_.-]|$|\d)"
)
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Names of files of a training's state that are no weights of a model.
_STATE = re.compile(
    r"(?:^|[_.-])(?:optim\w*|opt|scheduler\w*|lr_scheduler|scaler|sampler|dl_state_dict|rng\w*|random_states\w*|"
    r"training_args|step|custom_checkpoint\w*|metadata|loss\w*|args|config)(?:[_.-]|$)"
)
_USUAL = ("model", "pytorch_model", "diffusion_pytorch_model", "nnet", "net")  # files of weights
_LIGHTNING = "current_model_state"  # beside which Lightning's WeightAveraging has its average as state_dict
_DEPTH = 4  # of dicts in dicts that are looked into
_ITEMS = 10_000  # of a dict that is no set of weights
_COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # that classes of averages keep beside them
_PROJECTORS = "projectors."  # of REPA's own checkpoints: of training alone


@dataclass(frozen=True)
class _Set:
    """Weights by name that stand together in a file, and the names of what stands there and is none."""

    weights: Mapping[str, Tensor]
    others: list[str]


def weights_file(path: Path, choice: str | None) -> tuple[Path, list[str], str | None]:
    """The file of weights in the folder ``path``, what people should know of the choice, and what is left of ``--ema``.

    ``choice``, ``--ema``, may be the name of a file without its ending; else it is for what the file holds.

    Raises:
        UserError: none or several are there, or the folder is a checkpoint of another kind.
    """
    told = folder_instead(path)
    if told is not None:
        raise UserError(f"IN: '{path}' {told}")
    files = {file.stem: file for file in _weight_files(path)}
    if choice is not None and choice in files:
        return files[choice], [f"the weights in {files[choice].name} are taken"], None
    trained = [stem for stem in files if not _AVERAGE.search(stem)] or list(files)
    usual = [stem for stem in _USUAL if stem in trained] or trained
    if not files or (usual is trained and len(trained) > 1):
        held = f"holds {listed([file.name for file in files.values()])}" if files else "holds no file of weights"
        raise UserError(f"IN: '{path}' is a folder that {held}; give the file that holds the model's weights")
    taken = files[usual[0]]
    others = "".join(f"; --ema {stem} takes those in {file.name}" for stem, file in files.items() if file != taken)
    return taken, [f"the weights in {taken.name} are taken{others}"], choice


def _weight_files(path: Path) -> list[Path]:
    """Files that may hold weights; of two formats of the same, safetensors."""
    files = [
        file
        for file in sorted(path.iterdir())
        if file.name.endswith(_ENDINGS) and file.is_file() and not _STATE.search(file.name)
    ]
    return [
        file for file in files if file.suffix == ".safetensors" or not (path / f"{file.stem}.safetensors").is_file()
    ]


def weights_of(
    values: Any, where: str, choice: str | None = None, family: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors by their plain names, out of what a file holds, and what people should know of that.

    ``where`` names the file in messages. ``choice`` is ``--ema``: a key, or a prefix of names.

    Raises:
        UserError: there are no weights, they are of a kind that cannot be read, names collide, or it is not clear
            which of several models is meant.
    """
    refuse_files(values, f"IN: {where}")
    unnamed = _unnamed(values)
    found = dict(_sets(values))
    if unnamed and (choice in unnamed or not found):
        raise UserError(f"IN: {where} {no_names(f'{choice or unnamed[0]}.{UNNAMED}')}")
    known = {key: each for key, each in found.items() if _prefixes(_plain(each.weights), _anchors(family))}
    sets = known or {key: each for key, each in found.items() if key in (*_TRAINED, *_AVERAGES)}
    if not sets:
        kind = "a tensor" if isinstance(values, Tensor) else type(values).__name__
        held = listed([str(name) for name in values]) or "nothing" if isinstance(values, Mapping) else kind
        raise UserError(f"IN: {where} holds {held} and no weights by name; give the checkpoint of a model")
    key, inner = (choice, None) if choice in sets else (_chosen_set(sets, where), choice)
    chosen = sets[str(key)]
    labels = labels_of(chosen.weights, family)
    if inner is not None and inner.rstrip(".") not in labels:
        raise _not_there(inner, where, {*sets, *labels} - {""})
    notes = []
    if key:
        others = {} if key == choice else {name: f"under '{name}'" for name in sets if name != key}
        notes.append(_taken(f"under '{key}'", others))
    notes += [f"the averages under '{name}' are left out, since they carry no names" for name in unnamed]
    if chosen.others:
        notes.append(f"{listed(chosen.others)} beside the weights: left out")
    notes += origin_notes(values)
    state, more = plain_weights(chosen.weights, where, inner, family)
    return state, notes + more


def plain_weights(
    state: Mapping[str, Tensor], where: str, choice: str | None = None, family: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """One set of weights by the plain names of one model in it, and what people should know of that.

    Raises:
        UserError: as ``weights_of`` does.
    """
    names, notes = plain_names(state.keys(), where, choice, family)
    kept = {new: state[old] for new, old in names.items()}
    _refuse_empty(kept, where)
    return kept, notes


def plain_names(
    stored: Collection[str], where: str, choice: str | None = None, family: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The plain names of one model and the ``stored`` ones behind them, and what people should know of that.

    Raises:
        UserError: as ``weights_of`` does.
    """
    groups = _groups(_plain(stored), _anchors(family))
    if not groups:
        if choice is not None:
            raise _not_there(choice, where, set())
        refuse_other_models(stored, f"IN: {where}")
        names = _unwrapped_all(stored)
        return names, _wrapper_notes(names.values())
    prefix = _chosen_group(groups, where, choice)
    names, notes = groups[prefix], []
    refuse_kinds(names, f"IN: {where}")
    if prefix or len(groups) > 1:
        others = {each.rstrip("."): f"under '{each}'" for each in groups if each not in (prefix, "")}
        everything = len(names) == len(stored)
        which = f"under '{prefix}'" if prefix else "without a prefix"
        notes.append(f"'{prefix}' before all names was left out" if everything else _taken(which, others))
    notes += _wrapper_notes(stored for name, stored in names.items() if name not in _COUNTERS)
    taken = {old for group in groups.values() for old in group.values()}
    beside = sorted({old.partition(".")[0] for old in stored if old not in taken})
    if beside:
        notes.append(f"{len(stored) - len(taken)} tensors of something else are left out (under {listed(beside)})")
    names, more = _without_extras(names)
    return names, notes + more


def labels_of(names: Iterable[str], family: str | None = None) -> set[str]:
    """The prefixes below which models stand, as ``--ema`` calls them."""
    return {prefix.rstrip(".") for prefix in _prefixes(_plain(names), _anchors(family))} - {""}


def _sets(values: Any) -> Iterator[tuple[str, _Set]]:
    """Every set of weights by name, and the keys that lead to it with dots between them."""
    yield from _sets_below(values, "", 0, set())


def _sets_below(values: Any, path: str, depth: int, walked: set[int]) -> Iterator[tuple[str, _Set]]:
    """``walked``: ids of dicts of dicts, each of which is looked into where it first stands, however often it does."""
    if not isinstance(values, Mapping) or depth > _DEPTH:
        return
    tensors = {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors and (len(tensors) == len(values) or _prefixes(_plain(tensors), _anchors(None))):
        yield path, _Set(tensors, [str(name) for name in values if name not in tensors])
    elif len(values) <= _ITEMS and id(values) not in walked:
        walked.add(id(values))
        for key, value in values.items():
            if isinstance(key, str):
                yield from _sets_below(value, f"{path}.{key}" if path else key, depth + 1, walked)


def _unnamed(values: Any) -> list[str]:
    """Keys below which averages stand that carry no names."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return [str(key) for key, value in pairs if isinstance(value, Mapping) and isinstance(value.get(UNNAMED), list)]


def _chosen_set(sets: Mapping[str, _Set], where: str) -> str:
    """The key of the set that is taken where ``--ema`` names none."""
    trained = [_LIGHTNING] if _LIGHTNING in sets else [key for key in sets if not _AVERAGE.search(key)]
    usual = [key for key in _TRAINED if key in trained] or trained
    if len(trained) > 1 and usual is trained:
        raise UserError(
            f"IN: {where} holds several sets of weights (under {listed(trained)}); name the one that is meant by --ema"
        )
    return (usual or [key for key in _AVERAGES if key in sets] or list(sets))[0]


def _chosen_group(groups: Mapping[str, Mapping[str, str]], where: str, choice: str | None) -> str:
    """The prefix of the model that is taken: ``choice``, else the one that is trained."""
    labels = {prefix.rstrip("."): prefix for prefix in groups}
    if choice is not None:
        if choice.rstrip(".") not in labels:
            raise _not_there(choice, where, set(labels) - {""})
        return labels[choice.rstrip(".")]
    candidates = [label for label in labels if not _AVERAGE.search(label)] or list(labels)
    if len(candidates) > 1:
        raise UserError(
            f"IN: {where} holds several models (under {listed([labels[label] or 'no prefix' for label in candidates])}"
            "); name the one that is meant by --ema"
        )
    return labels[candidates[0]]


def _taken(what: str, others: Mapping[str, str]) -> str:
    """What is said where there is a choice. ``others``: what --ema takes instead, and where that stands."""
    told = "".join(f"; --ema {name} takes those {place}" for name, place in others.items())
    return f"the weights {what} are taken{told}"


def _not_there(choice: str, where: str, labels: Collection[str]) -> UserError:
    held = f"its weights stand under {listed(labels)}" if labels else "it holds one set of weights"
    return UserError(f"--ema: {choice} is not in {where}; {held}, so leave --ema out or name one of these")


def _anchors(family: str | None) -> set[str]:
    return {each.anchor for name, each in conversions().items() if family in (None, name)}


def _plain(names: Iterable[str]) -> dict[str, list[str]]:
    """Names without what wrappers put in, and the stored names behind each: two are a collision."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_stripped(name, (*_HIDDEN, _MODULE)), []).append(name)
    return found


def _stripped(name: str, wrappers: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _prefixes(plain: Iterable[str], anchors: Collection[str]) -> list[str]:
    """What stands before the anchors, the longest first."""
    found = {
        name.removesuffix(anchor)
        for name in plain
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    return sorted(found, key=lambda prefix: (-len(prefix), prefix))


def _groups(plain: Mapping[str, list[str]], anchors: Collection[str]) -> dict[str, dict[str, str]]:
    """By prefix: the model's own names and the stored ones. Raises UserError where two stored names become one."""
    groups: dict[str, dict[str, str]] = {prefix: {} for prefix in _prefixes(plain, anchors)}
    for name, stored in plain.items():
        prefix = next((each for each in groups if name.startswith(each)), None)
        if prefix is not None:
            if len(stored) > 1:
                raise _collision(stored)
            groups[prefix][name.removeprefix(prefix)] = stored[0]
    return groups


def _unwrapped_all(all_stored: Iterable[str]) -> dict[str, str]:
    """Plain names and the stored ones of a model that is not known: 'module.' goes where all names begin so."""
    names: dict[str, str] = {}
    for stored in all_stored:
        name = _stripped(stored, _HIDDEN)
        if name in names:
            raise _collision([names[name], stored])
        names[name] = stored
    while names and all(name.startswith(f"{_MODULE}.") for name in names):
        names = {name.removeprefix(f"{_MODULE}."): stored for name, stored in names.items()}
    return names


def _collision(stored: list[str]) -> UserError:
    return UserError(
        f"IN: '{stored[0]}' and '{stored[1]}' are the same parameter once what wrappers put into names is left out; "
        "save the state_dict() of one of the two models alone"
    )


def _wrapper_notes(stored: Iterable[str]) -> list[str]:
    """What was left out of names: before all of them, or inside some."""
    all_parts = [name.split(".") for name in stored]
    notes = []
    for wrapper in (*_HIDDEN, _MODULE):
        if any(wrapper in parts for parts in all_parts):
            leads = all(wrapper in _leading(parts) for parts in all_parts)
            notes.append(f"'{wrapper}.' {'before all' if leads else 'inside'} names was left out")
    return notes


def _leading(parts: list[str]) -> list[str]:
    """The wrappers that a name begins with."""
    count = next((number for number, part in enumerate(parts) if part not in (*_HIDDEN, _MODULE)), len(parts))
    return parts[:count]


def _without_extras(names: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Without what classes of averages and REPA keep beside a model, which is told."""
    counters = [name for name in names if name in _COUNTERS]
    projectors = [name for name in names if name.startswith(_PROJECTORS)]
    notes = []
    if counters:
        average = "; it tells that these weights are an average" if "n_averaged" in counters else ""
        notes.append(f"{listed(counters)} beside the weights: left out{average}")
    if projectors:
        notes.append(f"the projector of REPA ('{_PROJECTORS}*') is left out, which is of training alone")
    return {new: old for new, old in names.items() if new not in {*counters, *projectors}}, notes


def _refuse_empty(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError for the empty tensors that ZeRO-3 leaves in the place of weights."""
    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise UserError(
            f"IN: {where} holds no values for {listed(empty)}: under ZeRO-3 and FSDP they stand in the files of all "
            "ranks; read DeepSpeed's folder by --from deepspeed, or save FSDP's FULL_STATE_DICT"
        )
