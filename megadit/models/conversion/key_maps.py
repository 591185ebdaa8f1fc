"""Shared by the families' conversions: checks of names and shapes before anything is built from them, sizes inferred
from the weights, and muP's multipliers, which no other program has, folded into the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megadit.config.presets import MUP_BASE_WIDTH
from megadit.config.schema.model import ModelConfig, RoleHPs
from megadit.errors import UserError
from megadit.finite import describe_nonfinite
from megadit.models.conversion import conversions

_SHOWN = 5  # names that ``listed`` writes out


def listed(names: Collection[str]) -> str:
    """The first few of ``names``, sorted, and the number of the others."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def required(state: Mapping[str, Tensor], name: str, what: str, dims: int) -> Tensor:
    """The tensor called ``name``. Raises UserError where it is missing, or has not ``dims`` dimensions.

    ``what``: what the state dict should be, such as "an official DiT checkpoint".
    """
    value = state.get(name)
    if value is None:
        first = f"; it begins with {listed(list(state)[:3])}" if state else ""
        known = conversions().items()
        other = next((family for family, c in known if any(each.startswith(c.name_prefix) for each in state)), None)
        remedy = "name the format that it has with --from"
        if other is not None:
            remedy = f"read it with --from official-{other}; if that was given, give the whole model's state_dict()"
        raise UserError(f"IN: is not {what}: it has no {name}{first}; {remedy}")
    if value.dim() != dims:
        raise UserError(
            f"IN: is not {what}: {name} has shape {list(value.shape)}, {dims} dimensions are known; give another file"
        )
    return value


def optional(state: Mapping[str, Tensor], name: str, what: str, dims: int) -> Tensor | None:
    """The tensor called ``name``, None where there is none. Raises UserError where it has not ``dims`` dimensions."""
    return required(state, name, what, dims) if name in state else None


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules ``prefix``0, ``prefix``1, … in the names: the highest index plus 1."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def check_state_dict(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Check that a state dict has exactly the names and shapes of ``shapes``, all of floating point.

    Raises:
        UserError: names are missing or unexpected, or a tensor has another shape or type.
    """
    remedy = "give the whole checkpoint of the model that --from names, and hints that fit it"
    missing, unexpected = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    if missing or unexpected:
        problems = [f"missing are {listed(missing)}"] if missing else []
        problems += [f"unexpected are {listed(unexpected)}"] if unexpected else []
        raise UserError(f"IN: is not {what} of this size: {'; '.join(problems)}; {remedy}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise UserError(
                f"IN: is not {what} of this size: {name} has shape {list(state[name].shape)}, the other tensors ask "
                f"for {list(shape)}; {remedy}"
            )
    check_types(state)


def check_types(state: Mapping[str, Tensor]) -> None:
    """Raise UserError that names the first tensor that is not of floating point."""
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(
                f"IN: {name} holds {str(value.dtype).removeprefix('torch.')} and not floating-point weights; give a "
                "checkpoint that is not quantized"
            )


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by name, from a model on the meta device."""
    from megadit.models import build_model

    return {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}


def buffer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every buffer in a model's state dict by name, such as PixArt's null caption."""
    from megadit.models import build_model

    model = build_model(config, device="meta")
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in parameters}


def check_positions(stored: Tensor, expected: Tensor, name: str) -> None:
    """Raise UserError unless the stored position table is the fixed one of this model, ``expected``."""
    problem = describe_nonfinite([(name, stored)])
    if problem:
        raise UserError(f"IN: {problem}, and it is the table of positions; use an earlier checkpoint")
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected.float(), atol=tolerance, rtol=0):
        raise UserError(
            f"IN: {name} of shape {list(stored.shape)} is not the sin-cos table {list(expected.shape)} of this model; "
            "only models with the fixed table can be converted (--hint input_size=N says of which image size)"
        )


def infer_heads(width: int, hint: int | None, published: Mapping[int, int], head_dims: Sequence[int]) -> int:
    """Number of heads: the hint, that of the published size with this width, or by the one of ``head_dims`` that fits.

    Raises:
        UserError: none or several of ``head_dims`` divide the width and there is no hint, or the hint does not.
    """
    if hint is not None:
        return checked_heads(width, int(hint))
    if width in published:
        return published[width]
    fitting = [width // dim for dim in head_dims if width % dim == 0]
    if len(fitting) != 1:
        raise UserError(
            f"--hint heads: is needed, since nothing in the weights tells how many heads a width of {width} has; give "
            "--hint heads=N"
        )
    return fitting[0]


def checked_heads(width: int, heads: int) -> int:
    """``heads``. Raises UserError where the width is no multiple of it."""
    if width % heads:
        raise UserError(f"--hint heads: {heads} does not divide the width {width} of IN; give another number")
    return heads


def parametrization_keys(hints: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
    """Keys of ``model.*`` by the hints ``parametrization``, ``base_width`` and ``output_mult``."""
    keys: dict[str, Any] = {"heads": heads, "output_mult": float(hints.get("output_mult", 1.0))}
    if hints.get("parametrization", "sp") == "sp":
        return keys
    base = int(hints.get("base_width", MUP_BASE_WIDTH))
    return {**keys, "heads": None, "head_dim": width // heads, "parametrization": "mup", "base_width": base}


def learns_sigma(out: int, channels: int, what: str) -> bool:
    """Whether ``out`` channels are a prediction and a variance. ``what``: the model in messages, such as "a DiT".

    Raises:
        UserError: ``out`` is neither the input's ``channels`` nor twice as many.
    """
    if out not in (channels, 2 * channels):
        raise UserError(
            f"IN: is not {what}: it puts out {out} channels for an input of {channels}, and {what} has as many or "
            "twice as many; give another file"
        )
    return out == 2 * channels


def infer_input_size(table: Tensor | None, patch: int, hint: int | None) -> int:
    """Side of the image, from the stored positions (1, tokens, width), or where there are none from the hint.

    Raises:
        UserError: there is neither, or they differ.
    """
    if table is None:
        if hint is None:
            raise size_required("the file has no pos_embed that would tell")
        return int(hint)
    side = math.isqrt(table.shape[1]) * patch
    if hint is not None and int(hint) != side:
        raise UserError(f"--hint input_size: {hint}, but pos_embed of IN is for {side}; leave the hint out")
    return side


def size_required(why: str) -> UserError:
    """The error that asks for ``--hint input_size``, and why."""
    return UserError(
        f"--hint input_size: is needed, since {why}; give --hint input_size=N, the side of the (latent) image"
    )


def refuse_unsupported(unsupported: Mapping[str, bool], target: str) -> None:
    """Raise UserError for the first setting of the model (``key: value``) that is true in ``unsupported``."""
    for setting, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{setting}, which {target} cannot represent; this model stays with --to safetensors")


def readout_mult(config: ModelConfig) -> float:
    """Multiplier on the readout's input: output_mult / m (m is 1 under SP)."""
    return config.output_mult / config.width_mult


def fold_readout(config: ModelConfig, weight: Tensor) -> Tensor:
    """The final linear's weight (out, n) times output_mult / m; the same tensor where that is 1.

    The product is taken in float64 and rounded once. A bias is not multiplied in the forward pass, so it stays.
    """
    mult = readout_mult(config)
    return weight if mult == 1.0 else (weight.double() * mult).to(weight.dtype)


def fold_roles(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config with default ``role_hps``, weights with ``role_hps.<role>.mult`` folded in), the readout's excepted.

    Learning rates and init factors of ``role_hps`` have no effect on trained weights, and are dropped.
    """
    if all(getattr(config.role_hps, role).mult == 1.0 for role in type(config.role_hps).model_fields):
        return config.model_copy(update={"role_hps": RoleHPs()}), dict(state)
    from megadit.models import build_model
    from megadit.mup import param_specs

    mults = {
        name: spec.forward_mult
        for name, spec in param_specs(build_model(config, device="meta")).items()
        if spec.role != "output" and spec.forward_mult != 1.0
    }
    folded = {
        name: (value.double() * mults[name]).to(value.dtype) if name in mults else value
        for name, value in state.items()
    }
    return config.model_copy(update={"role_hps": RoleHPs()}), folded
