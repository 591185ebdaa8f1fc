"""Forward multipliers, which no other program has, folded into the weights that they multiply."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megadit.config.schema.model import ModelConfig, RoleHPs


def readout_mult(config: ModelConfig) -> float:
    """What the readout's input is multiplied by: output_mult / m (m is 1 under SP)."""
    return config.output_mult / config.width_mult


def fold_readout(config: ModelConfig, weight: Tensor) -> Tensor:
    """The final linear's weight (out, n) times output_mult / m; the same tensor where that is 1.

    The product is taken in float64 and rounded once. A bias is not multiplied in the forward pass, so it stays.
    """
    mult = readout_mult(config)
    return weight if mult == 1.0 else (weight.double() * mult).to(weight.dtype)


def fold_roles(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config without role multipliers, weights with them folded in); the readout's multiplier stays as it is.

    Every matrix and table under ``role_hps.<role>.mult`` takes its multiplier; learning rates and init factors of
    ``role_hps`` are left out too, since they say nothing about finished weights.
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
