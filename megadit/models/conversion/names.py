"""Names and shapes of a state dict, looked at before anything is built from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError
from megadit.finite import not_finite

# How names of each family begin that no other has.
_SIGNS = (
    ("joint_blocks.", "mmdit"),
    ("y_embedder.y_proj.", "pixart"),
    ("y_embedder.embedding_table.", "dit"),
    ("in_blocks.", "uvit"),
)
_SHOWN = 5  # names that a sentence lists before it counts the rest


def listed(names: Collection[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def needed(state: Mapping[str, Tensor], name: str, what: str, dims: int) -> Tensor:
    """The tensor called ``name``, which has ``dims`` dimensions. Raises UserError that names it and ``what`` it is of.

    ``what`` says what the state dict should be, such as "an official DiT checkpoint".
    """
    value = state.get(name)
    if value is None:
        first = f"; it begins with {listed(list(state)[:3])}" if state else ""
        found = next((family for sign, family in _SIGNS if any(each.startswith(sign) for each in state)), None)
        remedy = "name the format that it has with --from"
        if found is not None:
            remedy = f"read it with --from official-{found}; if that was given, give the whole model's state_dict()"
        raise UserError(f"IN: is not {what}: it has no {name}{first}; {remedy}")
    if value.dim() != dims:
        raise UserError(
            f"IN: is not {what}: {name} has shape {list(value.shape)}, {dims} dimensions are known; give another file"
        )
    return value


def blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules ``prefix``0, ``prefix``1, … the names speak of: the highest number and one."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def check(state: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]], what: str) -> None:
    """Refuse a state dict that has not exactly the names and shapes ``wanted``, all of floating point.

    Raises:
        UserError: listing what is missing, what is unexpected, or the tensors of another shape or type.
    """
    remedy = "give the whole checkpoint of the model that --from names, and hints that fit it"
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected:
        found = [f"missing are {listed(missing)}"] if missing else []
        found += [f"unexpected are {listed(unexpected)}"] if unexpected else []
        raise UserError(f"IN: is not {what} of this size: {'; '.join(found)}; {remedy}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != tuple(shape):
            raise UserError(
                f"IN: is not {what} of this size: {name} has shape {list(state[name].shape)}, the other tensors ask "
                f"for {list(shape)}; {remedy}"
            )
    check_types(state)


def check_types(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not of floating point. Raises UserError with the first."""
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(
                f"IN: {name} holds {str(value.dtype).removeprefix('torch.')} and not floating-point weights; give a "
                "checkpoint that is not quantized"
            )


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by its name, counted without memory."""
    from megadit.models import build_model

    return {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}


def buffer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything else in a model's state dict, such as PixArt's null caption."""
    from megadit.models import build_model

    model = build_model(config, device="meta")
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in parameters}


def check_positions(stored: Tensor, wanted: Tensor, name: str) -> None:
    """Refuse a stored table of positions that is not the fixed one this model adds. Raises UserError."""
    told = not_finite([(name, stored)])
    if told:
        raise UserError(f"IN: {told}, and it is the table of positions; use an earlier checkpoint")
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if stored.shape != wanted.shape or not torch.allclose(stored.float(), wanted.float(), atol=tolerance, rtol=0):
        raise UserError(
            f"IN: {name} of shape {list(stored.shape)} is not the sin-cos table {list(wanted.shape)} of this model; "
            "only models with the fixed table can be converted (--hint input_size=N says of which image size)"
        )
