"""Which weights are a model's in what a training program saved, chosen by names alone; no tensor is read.

Of a folder, one file holds them: U-ViT's ``500000.ckpt`` has ``nnet.pth`` and ``nnet_ema.pth`` beside the optimizer's,
accelerate's folders ``model.safetensors`` or ``pytorch_model.bin``. A file may hold sets of weights below keys
(``state_dict``, ``ema``), beside optimizers and settings. Within a set, ``parameter_names`` finds the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megadit.convert.foreign_names import UNNAMED, no_names, origin_notes, refuse_files
from megadit.convert.parameter_names import (
    holds_model,
    is_average,
    no_such_weights,
    plain_weights,
    prefixes_of,
    taken_note,
)
from megadit.errors import UserError
from megadit.files.folder_kind import folder_instead
from megadit.models.conversion.key_maps import listed

# Keys below which weights stand, the first that is there: trained ones, and averages where there are no others.
_TRAINED = ("", "current_model_state", "state_dict", "model", "module", "model_state_dict", "net", "nnet", "network")
_AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "nnet_ema")
_LIGHTNING = "current_model_state"  # beside which Lightning's WeightAveraging has its average as state_dict
_FILES = ("model", "pytorch_model", "diffusion_pytorch_model", "nnet", "net")  # of trained weights, without endings
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Names of files of a training's state that are no weights of a model.
_STATE = re.compile(
    r"(?:^|[_.-])(?:optim\w*|opt|scheduler\w*|lr_scheduler|scaler|sampler|dl_state_dict|rng\w*|random_states\w*|"
    r"training_args|step|custom_checkpoint\w*|metadata|loss\w*|args|config)(?:[_.-]|$)"
)
_DEPTH = 4  # of dicts in dicts that are looked into
_ITEMS = 10_000  # of a dict that is no set of weights


class _NamedWeights(NamedTuple):
    """Weights by name that stand together in a file, and the names of what stands there and is none."""

    weights: Mapping[str, Tensor]
    others: list[str]


def weights_file(path: Path, choice: str | None) -> tuple[Path, list[str], str | None]:
    """The file of weights in the folder ``path``, what people should know of the choice, and what is left of ``--ema``.

    ``choice``, ``--ema``, may be the name of a file without its ending; else it is for what the file holds.

    Raises:
        UserError: none or several are there, or the folder is a checkpoint of another kind.
    """
    other = folder_instead(path)
    if other is not None:
        raise UserError(f"IN: '{path}' {other}")
    files = {file.stem: file for file in _weight_files(path)}
    if choice is not None and choice in files:
        return files[choice], [taken_note(f"in {files[choice].name}", {})], None
    trained = [stem for stem in files if not is_average(stem)] or list(files)
    usual = [stem for stem in _FILES if stem in trained] or trained
    if not files or (usual is trained and len(trained) > 1):
        held = f"holds {listed([file.name for file in files.values()])}" if files else "holds no file of weights"
        raise UserError(f"IN: '{path}' is a folder that {held}; give the file that holds the model's weights")
    chosen = files.pop(usual[0])
    others = {stem: f"in {file.name}" for stem, file in files.items()}
    return chosen, [taken_note(f"in {chosen.name}", others)], choice


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
    unnamed = _unnamed_averages(values)
    all_sets = dict(_sets(values, "", 0, set()))
    if unnamed and (choice in unnamed or not all_sets):
        raise UserError(f"IN: {where} {no_names(f'{choice or unnamed[0]}.{UNNAMED}')}")
    known = {key: named for key, named in all_sets.items() if holds_model(named.weights, family)}
    sets = known or {key: named for key, named in all_sets.items() if key in (*_TRAINED, *_AVERAGES)}
    if not sets:
        kind = "a tensor" if isinstance(values, Tensor) else type(values).__name__
        held = listed([str(name) for name in values]) or "nothing" if isinstance(values, Mapping) else kind
        raise UserError(f"IN: {where} holds {held} and no weights by name; give the checkpoint of a model")
    key, prefix = (choice, None) if choice is not None and choice in sets else (_chosen_key(sets, where), choice)
    weights, others = sets[key]
    prefixes = prefixes_of(weights, family)
    if prefix is not None and prefix.rstrip(".") not in prefixes:
        raise no_such_weights(prefix, where, {*sets, *prefixes} - {""})
    notes = []
    if key:
        other_sets = {} if key == choice else {name: f"under '{name}'" for name in sets if name != key}
        notes.append(taken_note(f"under '{key}'", other_sets))
    notes += [f"the averages under '{name}' are left out, since they carry no names" for name in unnamed]
    if others:
        notes.append(f"{listed(others)} beside the weights: left out")
    notes += origin_notes(values)
    state, more = plain_weights(weights, where, prefix, family)
    return state, notes + more


def _sets(values: Any, path: str, depth: int, walked: set[int]) -> Iterator[tuple[str, _NamedWeights]]:
    """Every set of weights by name, and the keys that lead to it with dots between them.

    ``walked``: ids of dicts of dicts, each of which is looked into where it first stands, however often it does.
    """
    if not isinstance(values, Mapping) or depth > _DEPTH:
        return
    tensors = {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors and (len(tensors) == len(values) or holds_model(tensors)):
        yield path, _NamedWeights(tensors, [str(name) for name in values if name not in tensors])
    elif len(values) <= _ITEMS and id(values) not in walked:
        walked.add(id(values))
        for key, value in values.items():
            if isinstance(key, str):
                yield from _sets(value, f"{path}.{key}" if path else key, depth + 1, walked)


def _unnamed_averages(values: Any) -> list[str]:
    """Keys below which averages stand that carry no names."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return [str(key) for key, value in pairs if isinstance(value, Mapping) and isinstance(value.get(UNNAMED), list)]


def _chosen_key(sets: Mapping[str, _NamedWeights], where: str) -> str:
    """The key of the set that is taken where ``--ema`` names none."""
    trained = [_LIGHTNING] if _LIGHTNING in sets else [key for key in sets if not is_average(key)]
    usual = [key for key in _TRAINED if key in trained] or trained
    if len(trained) > 1 and usual is trained:
        raise UserError(
            f"IN: {where} holds several sets of weights (under {listed(trained)}); name the one that is meant by --ema"
        )
    return (usual or [key for key in _AVERAGES if key in sets] or list(sets))[0]
