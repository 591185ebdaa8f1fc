"""Checkpoints of the families' original code: torch files or safetensors, wrapped in the ways that are usual."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.config.schema.model import ModelConfig
from megadit.convert.contents import Contents, ValueCheck
from megadit.convert.family_adapters import from_official, to_official
from megadit.convert.request import Request
from megadit.convert.state_dicts import is_sharded, joined_weights, load_tensors, write_one
from megadit.convert.torch_files.safe_load import load_deferred
from megadit.convert.torch_files.write import save_streaming
from megadit.convert.weight_sets import weights_file, weights_of
from megadit.errors import UserError
from megadit.models.conversion import conversion_of
from megadit.models.conversion.key_maps import model_shapes, readout_mult

_ENDINGS = (".pt", ".pth", ".safetensors")
_OF_CONFIG = ("input_size", "pos_scale")  # hints that a --config answers, beside the heads and the text's length


def read_official(family: str, path: Path, request: Request, check: ValueCheck) -> Contents:
    """The contents of the family's official file, or of a folder that a trainer wrote; ``check`` looks at the values.

    Raises:
        UserError: a file is broken, holds more than data, or is not this family's.
    """
    state, notes = _weights(path, request, family)
    model, weights = from_official(family, check.watched(state), **_with_config(family, request))
    return contents_of(f"official {family} checkpoint '{path}'", model, weights, notes=tuple(notes))


def write_official(family: str, contents: Contents, target: Path) -> list[str]:
    """Write an official file, ``.pt``, ``.pth`` or ``.safetensors``; returns what people should know.

    Raises:
        UserError: the name has another ending, or the model is not of this family or cannot be written.
    """
    if not target.name.endswith(_ENDINGS):
        name = target.name.removeprefix(".tmp-")  # under which it is written first
        raise UserError(f"OUT: '{name}' has none of the endings {', '.join(_ENDINGS)}; give it one")
    model = model_of(contents)
    if model.family != family:
        raise UserError(
            f"--to: official-{family} is asked for, but the model is of family {model.family}; give the format of "
            "its own family"
        )
    official = to_official(model, contents.state_dict())
    official = {name: value.float().contiguous() for name, value in official.items()}
    if target.name.endswith(".safetensors"):
        write_one(target, official)
    else:
        key = conversion_of(family).weights_key
        save_streaming(official if key is None else {key: official}, target)
    return contents.weights_only_notes + folded_notes(model)


def contents_of(description: str, model: ModelConfig, state: Mapping[str, Tensor], **fields: Any) -> Contents:
    """Contents of a model whose parameters and buffers are there by name, deferred or in memory."""
    shapes = model_shapes(model)
    extras = {name: value.float() for name, value in state.items() if name not in shapes}
    return Contents.of_weights(
        description, {name: state[name] for name in shapes}, model=model, extras=extras, **fields
    )


def model_of(contents: Contents) -> ModelConfig:
    """The model that the weights are of. Raises UserError where neither the source nor a config says."""
    if contents.model is not None:
        return contents.model
    if contents.config is not None:
        return contents.config.model
    raise UserError(f"--config: is needed, since {contents.description} does not say of which model its weights are")


def folded_notes(model: ModelConfig) -> list[str]:
    """What an export changed, for people."""
    notes = []
    if readout_mult(model) != 1.0:
        notes.append(f"the readout's multiplier {readout_mult(model):g} is in its weight now, which SP's models have")
    if model.repa is not None:
        notes.append("the projector of REPA is left out, which this format does not have")
    return notes


def _with_config(family: str, request: Request) -> dict[str, Any]:
    """The hints, and what the ``--config`` says of those that are not given."""
    hints, known = dict(request.hints), conversion_of(family).hints
    if request.config is None:
        return hints
    model = request.config.model
    if model.family != family:
        raise UserError(f"model.family: {model.family} in --config, but --from is official-{family}; make them agree")
    answers: dict[str, Any] = {key: getattr(model, key) for key in _OF_CONFIG} | {"heads": model.num_heads}
    answers["text_max_length"] = None if model.text is None else model.text.max_length
    if hints.get("parametrization") == "mup":
        answers |= {"base_width": model.base_width, "output_mult": model.output_mult}
    for key, value in answers.items():
        if key in known and key not in hints and value is not None:
            hints[key] = value
    return hints


def _weights(path: Path, request: Request, family: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, out of their wrapping and without prefixes, and what people should know of that."""
    values: Any
    file_notes: list[str]
    choice, file_notes = request.ema, []
    if is_sharded(path):
        values, file_notes = joined_weights(path)
    else:
        if path.is_dir():
            path, file_notes, choice = weights_file(path, choice)
        values = load_tensors(path) if path.name.endswith(".safetensors") else load_deferred(path)
    state, notes = weights_of(values, f"'{path}'", choice, family)
    return state, file_notes + notes
