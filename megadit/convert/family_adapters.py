"""State dicts of other programs to megadit's and back, in memory, by the adapter of the family (its ``convert.py``).

A model is a config and a state dict of its parameters by name. Nothing is read from disk or written, and nothing is
copied without need: tensors of a result may be those that were given. Files are read and written by
``megadit.convert.official`` and ``megadit.convert.diffusers.folder``, which call these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megadit.config.family import family_spec
from megadit.config.loading.messages import validation_message
from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError
from megadit.files.json_fields import Fields
from megadit.models.conversion import conversion_of, diffusers_classes, diffusers_of
from megadit.models.conversion.diffusers_class import WHERE, class_config

if TYPE_CHECKING:
    from torch import Tensor

# Names of hints, of any family, by the kind of value that they take; ``parametrization`` is checked by itself.
_WHOLE = {"heads", "input_size", "base_width", "text_max_length", "max_length", "pos_embed_max_size"}
_REAL = {"output_mult", "pos_scale"}


def from_official(family: str, state_dict: Mapping[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a model in its family's original form (mmdit's is Stable Diffusion 3's).

    ``hints`` say what the weights cannot, such as ``heads=16, input_size=32``: those of its ``Conversion``.

    Raises:
        UserError: the family has no such form, names, shapes or types are not those of it, or a hint is missing or
            wrong.
    """
    from megadit.models.conversion.key_maps import check_types

    conversion = conversion_of(family)
    unknown = sorted(set(hints) - set(conversion.hints))
    if unknown:
        raise UserError(
            f"--hint {unknown[0]}: is not known for {family}; known are {', '.join(conversion.hints) or 'none'}"
        )
    _check_hints(hints)
    check_types(state_dict)
    config, state = _adapted(conversion.from_official, state_dict, **hints)
    _check_complete(config, state, f"an official {family} checkpoint")
    return config, state


def to_official(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the family's original code loads; multipliers are folded, REPA's projector is left out.

    Raises:
        UserError: the original has no place for something of this model, or the weights are not this config's.
    """
    adapter = conversion_of(config.family).to_official
    official: dict[str, Tensor] = _adapted(adapter, *_exported(config, state_dict))
    return official


def from_diffusers(
    config_json: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    max_length: int | None = None,
    where: str = WHERE,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a transformer of diffusers, from its config.json and its weights.

    ``max_length``: tokens of a text, which no class holds; default: what the published pipelines use. ``where`` names
    the config in messages.

    Raises:
        UserError: its ``_class_name`` is not known, or the weights or options are not those of the family.
    """
    from megadit.models.conversion.key_maps import check_types

    known, _ = class_config(Fields(config_json, where))
    family = diffusers_classes()[known["_class_name"]]
    check_types(state_dict)
    # A null caption is as long as a text, so that a family that has one must know the length to make it.
    options = {"max_length": max_length} if family_spec(family).null_caption else {}
    config, state = _adapted(diffusers_of(family).from_diffusers, known, state_dict, where=where, **options)
    if max_length is not None and config.text is not None:
        config = config.model_copy(update={"text": config.text.model_copy(update={"max_length": max_length})})
    _check_complete(config, state, f"a {known['_class_name']} of diffusers")
    return config, state


def to_diffusers(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of diffusers' class; multipliers are folded, REPA's projector is left out.

    Whether that class computes the same is for ``diffusers_gap`` and ``megadit.convert.diffusers.difference`` to say.

    Raises:
        UserError: the class has no place for something of this model, or the weights are not this config's.
    """
    adapter = diffusers_of(config.family).to_diffusers
    config_json, state = _adapted(adapter, *_exported(config, state_dict))
    return dict(config_json), state


def diffusers_gap(config_json: Mapping[str, Any], where: str = WHERE) -> str | None:
    """Why diffusers' class with this config.json cannot compute what the model here does; None where it is the same.

    Raises:
        UserError: its ``_class_name`` is not known, or a value is none of its type.
    """
    known, _ = class_config(Fields(config_json, where))
    return diffusers_of(diffusers_classes()[known["_class_name"]]).mismatch(known, where)


def _check_hints(hints: Mapping[str, Any]) -> None:
    """Refuse values that are not of their kind, or that would have no effect. Raises UserError."""
    kind = hints.get("parametrization", "sp")
    if kind not in ("sp", "mup"):
        raise UserError(f"--hint parametrization: {kind} is not one of sp, mup; give one of the two")
    if "base_width" in hints and kind != "mup":
        raise UserError(
            f"--hint base_width: {hints['base_width']} has no effect without --hint parametrization=mup; give both"
        )
    for name, value in hints.items():
        if name not in _WHOLE and name not in _REAL:
            continue
        number = "whole number" if name in _WHOLE else "number"
        kinds = int if name in _WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise UserError(f"--hint {name}: {value!r} is not a {number} above 0; give one")


def _adapted(adapter: Callable[..., Any], *values: Any, **hints: Any) -> Any:
    """The result of a family's adapter, which refuses names and shapes itself. Raises UserError for a config that the
    weights ask for and that cannot be, and for a name that the adapter, perhaps a plugin's, looked up unchecked.
    """
    try:
        return adapter(*values, **hints)
    except ValidationError as error:
        problem = validation_message(error, ModelConfig, {}).replace("\n", "; ")
        raise UserError(f"{hints.get('where', 'IN')}: cannot be this family's model: {problem}") from error
    except KeyError as error:
        raise UserError(
            f"IN: has no {error.args[0]}; give the whole checkpoint of the model that --from names"
        ) from error


def _check_complete(config: ModelConfig, state: Mapping[str, Tensor], description: str) -> None:
    """Refuse a state dict without all parameters, or with more than these and the model's buffers."""
    from megadit.models.conversion.key_maps import buffer_shapes, check_state_dict, model_shapes

    buffers = {name: shape for name, shape in buffer_shapes(config).items() if name in state}
    check_state_dict(state, model_shapes(config) | buffers, description)


def _exported(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model as others know it: without REPA's projector, multipliers folded into the weights but the readout's."""
    from megadit.models.conversion.key_maps import fold_roles
    from megadit.models.repa import without_projector

    weights = without_projector(state)
    config = config.model_copy(update={"repa": None})
    _check_complete(config, weights, f"a {config.family} model of this config")
    return fold_roles(config, weights)
