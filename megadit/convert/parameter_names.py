"""Names of a model's parameters, without what wrappers and trainers put into them.

Names carry parts of wrappers (``module`` of DDP, ``_orig_mod`` of torch.compile, FSDP's) and the prefix of the
attribute under which a trainer keeps the model (``model.``, ``net.``, ``ema_model.``, ``model.diffusion_model.``).
Prefixes need no list: each family has one parameter whose name ends alike wherever the model stands, its anchor. What
stands before the anchor is a prefix, and its model the names that begin so. Models are never merged: the notes say
which one is taken, and ``--ema`` takes another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from megadit.convert.foreign_names import refuse_kinds, refuse_other_models
from megadit.errors import UserError
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
_WRAPPERS = (*_HIDDEN, _MODULE)
_AVERAGE = re.compile(  # in keys, prefixes and names of files
    r"(?:^|[_.-])(?:ema|avg|averaged?|averaging|shadow|slow|swa|polyak|teacher|target)(?:[_.-]|$|\d)"
)
_COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # that classes of averages keep beside them
_PROJECTORS = "projectors."  # of REPA's own checkpoints: of training alone


def plain_weights(
    state: Mapping[str, Tensor], where: str, choice: str | None = None, family: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """One set of weights by the plain names of one model in it, and what people should know of that.

    Raises:
        UserError: as ``plain_names`` does, or the tensors are the empty ones that ZeRO-3 leaves in place of weights.
    """
    names, notes = plain_names(state.keys(), where, choice, family)
    empty = [name for name, stored in names.items() if state[stored].numel() == 0]
    if empty:
        raise UserError(
            f"IN: {where} holds no values for {listed(empty)}: under ZeRO-3 and FSDP they stand in the files of all "
            "ranks; read DeepSpeed's folder by --from deepspeed, or save FSDP's FULL_STATE_DICT"
        )
    return {name: state[stored] for name, stored in names.items()}, notes


def plain_names(
    stored: Collection[str], where: str, choice: str | None = None, family: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The plain names of one model and the ``stored`` ones behind them, and what people should know of that.

    ``where`` names the file in messages. ``choice`` is ``--ema``: the prefix of the model that is meant.

    Raises:
        UserError: it is of a kind that cannot be read, names collide, or it is not clear which of several models is
            meant.
    """
    models = _models(stored, family)
    if not models:
        if choice is not None:
            raise no_such_weights(choice, where, set())
        refuse_other_models(stored, f"IN: {where}")
        names = _of_unknown_model(stored)
        return names, _wrapper_notes(names.values())
    prefix = _chosen_prefix(models, where, choice)
    names, notes = _without_collisions(models[prefix]), []
    refuse_kinds(names, f"IN: {where}")
    if prefix or len(models) > 1:
        others = {each.rstrip("."): f"under '{each}'" for each in models if each not in (prefix, "")}
        everything = len(names) == len(stored)
        which = f"under '{prefix}'" if prefix else "without a prefix"
        notes.append(f"'{prefix}' before all names was left out" if everything else taken_note(which, others))
    notes += _wrapper_notes(stored for name, stored in names.items() if name not in _COUNTERS)
    of_models = {name for model in models.values() for names_behind in model.values() for name in names_behind}
    beside = sorted({name.partition(".")[0] for name in stored if name not in of_models})
    if beside:
        notes.append(f"{len(stored) - len(of_models)} tensors of something else are left out (under {listed(beside)})")
    names, more = _without_extras(names)
    return names, notes + more


def prefixes_of(names: Iterable[str], family: str | None = None) -> set[str]:
    """The prefixes below which models stand, as ``--ema`` calls them."""
    return {prefix.rstrip(".") for prefix in _models(names, family)} - {""}


def holds_model(names: Iterable[str], family: str | None = None) -> bool:
    """Whether a model of a known family, or of this one, is among the names."""
    return bool(_models(names, family))


def is_average(name: str) -> bool:
    """Whether a key, a prefix or a file's name says that its weights are an average."""
    return _AVERAGE.search(name) is not None


def taken_note(which: str, others: Mapping[str, str]) -> str:
    """The note where there is a choice. ``others``: what --ema takes instead, and where that stands."""
    return f"the weights {which} are taken" + "".join(f"; --ema {key} takes those {at}" for key, at in others.items())


def no_such_weights(choice: str, where: str, labels: Collection[str]) -> UserError:
    """The sentence for an ``--ema`` that is not there; ``labels`` are."""
    held = f"its weights stand under {listed(labels)}" if labels else "it holds one set of weights"
    return UserError(f"--ema: {choice} is not in {where}; {held}, so leave --ema out or name one of these")


def _models(names: Iterable[str], family: str | None) -> dict[str, dict[str, list[str]]]:
    """By prefix, the longest first: a model's own names, each with the stored ones behind it."""
    anchors = {conversion.anchor for name, conversion in conversions().items() if family in (None, name)}
    unwrapped = _unwrapped(names, _WRAPPERS)
    prefixes = {
        name.removesuffix(anchor)
        for name in unwrapped
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    models: dict[str, dict[str, list[str]]] = {
        prefix: {} for prefix in sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))
    }
    for name, stored in unwrapped.items():
        prefix = next((prefix for prefix in models if name.startswith(prefix)), None)
        if prefix is not None:
            models[prefix][name.removeprefix(prefix)] = stored
    return models


def _unwrapped(names: Iterable[str], wrappers: Collection[str]) -> dict[str, list[str]]:
    """Names without the parts of ``wrappers``, and the stored names behind each: two are a collision."""
    unwrapped: dict[str, list[str]] = {}
    for name in names:
        unwrapped.setdefault(".".join(part for part in name.split(".") if part not in wrappers), []).append(name)
    return unwrapped


def _without_collisions(names: Mapping[str, list[str]]) -> dict[str, str]:
    for stored in names.values():
        if len(stored) > 1:
            raise UserError(
                f"IN: '{stored[0]}' and '{stored[1]}' are the same parameter once what wrappers put into names is left "
                "out; save the state_dict() of one of the two models alone"
            )
    return {name: stored[0] for name, stored in names.items()}


def _of_unknown_model(stored: Iterable[str]) -> dict[str, str]:
    """Plain names and the stored ones of a model that is not known: 'module.' goes where all names begin so."""
    names = _without_collisions(_unwrapped(stored, _HIDDEN))
    while names and all(name.startswith(f"{_MODULE}.") for name in names):
        names = {name.removeprefix(f"{_MODULE}."): stored for name, stored in names.items()}
    return names


def _chosen_prefix(models: Collection[str], where: str, choice: str | None) -> str:
    """The prefix of the model that is taken: ``choice``, else the one that is trained."""
    labels = {prefix.rstrip("."): prefix for prefix in models}
    if choice is not None:
        if choice.rstrip(".") not in labels:
            raise no_such_weights(choice, where, set(labels) - {""})
        return labels[choice.rstrip(".")]
    candidates = [label for label in labels if not is_average(label)] or list(labels)
    if len(candidates) > 1:
        raise UserError(
            f"IN: {where} holds several models (under {listed([labels[label] or 'no prefix' for label in candidates])}"
            "); name the one that is meant by --ema"
        )
    return labels[candidates[0]]


def _wrapper_notes(stored: Iterable[str]) -> list[str]:
    """What was left out of names: before all of them, or inside some."""
    all_parts = [name.split(".") for name in stored]
    notes = []
    for wrapper in _WRAPPERS:
        if any(wrapper in parts for parts in all_parts):
            leads = all(wrapper in itertools.takewhile(_WRAPPERS.__contains__, parts) for parts in all_parts)
            notes.append(f"'{wrapper}.' {'before all' if leads else 'inside'} names was left out")
    return notes


def _without_extras(names: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Without what classes of averages and REPA keep beside a model, and notes on it."""
    counters = [name for name in names if name in _COUNTERS]
    projectors = [name for name in names if name.startswith(_PROJECTORS)]
    notes = []
    if counters:
        average = "; it tells that these weights are an average" if "n_averaged" in counters else ""
        notes.append(f"{listed(counters)} beside the weights: left out{average}")
    if projectors:
        notes.append(f"the projector of REPA ('{_PROJECTORS}*') is left out, which is of training alone")
    return {new: old for new, old in names.items() if new not in {*counters, *projectors}}, notes
