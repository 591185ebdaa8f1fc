"""Whether a checkpoint and a run's configuration go together, and in what they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megadit.checkpoint.read import StoredCheckpoint
from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.models.repa import PREFIX, without_projector
from megadit.nested import flatten

# Any layout trains the same model.
_LAYOUT_KEYS = (
    *(f"parallel.{key}" for key in ("tensor", "pipeline", "sequence", "zero_stage")),
    "train.micro_batch",
)
# Of the model section, what leaves the weights' meaning the same: how they are computed with, and how they began.
_NOT_THE_MODEL = {"attention_precision", "norm_precision", "init", "adaln_init"}


def check_same_model(checkpoint: StoredCheckpoint, config: RunConfig) -> None:
    """Refuse to resume ``config`` from a checkpoint of another model, seed or global batch.

    Raises:
        UserError: naming the differing model keys, or train.seed or train.global_batch.
    """
    current, stored = config.model_dump(mode="json"), checkpoint.config
    keys = sorted((set(current["model"]) | set(stored["model"])) - _NOT_THE_MODEL)
    if current["model"]["parametrization"] == stored["model"].get("parametrization") == "sp":
        keys.remove("base_width")  # which nothing reads there
    different = [key for key in keys if current["model"].get(key) != stored["model"].get(key)]
    if different:
        changes = (f"model.{key} {stored['model'].get(key)} → {current['model'].get(key)}" for key in different[:4])
        raise UserError(
            f"checkpoint {checkpoint.path}: is of another model ({', '.join(changes)}); "
            f"{_other_model_remedy(checkpoint, config)}"
        )
    for key in ("seed", "global_batch"):
        if current["train"][key] != stored["train"][key]:
            raise UserError(
                f"train.{key}: {current['train'][key]} differs from {stored['train'][key]} of checkpoint "
                f"{checkpoint.path}; a resumed run keeps it, since the order of images depends on it; train.init_from "
                "starts a new run from these weights"
            )


def _other_model_remedy(checkpoint: StoredCheckpoint, config: RunConfig) -> str:
    if shape_problem(checkpoint.parameters, shapes_of(config)):
        return (
            "muP transfers hyperparameters, not weights: train the larger model from its own initialization (leave "
            "--resume out and give another --run_dir), or resume with the checkpoint's own config"
        )
    return (
        "resume with its own config, or start a new run from its weights alone with train.init_from="
        f"{checkpoint.path} and another --run_dir"
    )


def check_shapes(
    checkpoint: StoredCheckpoint,
    shapes: Mapping[str, Sequence[int]],
    stored: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Refuse another model's parameters. ``shapes``: of the model, by name; ``stored``: default, the checkpoint's.

    Raises:
        UserError: naming a parameter that is missing, is too many or has another shape.
    """
    problem = shape_problem(checkpoint.parameters if stored is None else stored, shapes)
    if problem:
        raise UserError(f"checkpoint {checkpoint.path}: {problem}; give a checkpoint of a model of the same shape")


def check_initial_weights(checkpoint: StoredCheckpoint, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """``check_shapes`` for a new run, in which either side may lack REPA's projector.

    Returns a note on the projector where one side lacks it. Raises UserError as ``check_shapes`` does.
    """
    stored, needed = (any(name.startswith(PREFIX) for name in names) for names in (checkpoint.parameters, shapes))
    if stored == needed:
        check_shapes(checkpoint, shapes)
        return None
    check_shapes(checkpoint, without_projector(shapes), without_projector(checkpoint.parameters))
    if needed:
        return "the projector of REPA is not in the checkpoint and starts afresh"
    return "the projector of REPA in the checkpoint is left out, since model.repa is not set"


def shape_problem(stored: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> str | None:
    """The first parameter, by name, that only one side has or whose shapes differ, as a phrase of a sentence."""
    for name in sorted({*needed, *stored}):
        stored_shape, needed_shape = stored.get(name), needed.get(name)
        if stored_shape is None:
            return f"has no parameter '{name}', which the model needs"
        if needed_shape is None:
            return f"has a parameter '{name}', which the model does not know"
        if list(stored_shape) != list(needed_shape):
            return f"parameter '{name}' has shape {list(stored_shape)}, the model needs {list(needed_shape)}"
    return None


def shapes_of(config: RunConfig) -> dict[str, list[int]]:
    """Global shape of every trained parameter of a configuration's model."""
    from megadit.models import build_model

    model = build_model(config.model, device="meta")
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def changed_values(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The (old, new) values of keys of two run configs that differ; layout keys left out."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in new if key in old and key not in _LAYOUT_KEYS]
    return {key: (old[key], new[key]) for key in keys if old[key] != new[key]}


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Keys of two run configs whose values differ, as ``key old → new``; layout keys left out."""
    return [f"{key} {old} → {new}" for key, (old, new) in changed_values(before, after).items()]
