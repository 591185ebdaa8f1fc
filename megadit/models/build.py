"""Builds models, and counts their parameters, from a configuration."""

from __future__ import annotations

import torch
from torch import nn

from megadit.config.family import family_spec
from megadit.config.schema.model import ModelConfig
from megadit.models.repa import RepaProjector
from megadit.models.stages import StagedModel
from megadit.mup.init import init_parameters
from megadit.mup.rules import FAN_IN_SCHEME, Parametrization
from megadit.parallel.tensor import UNSHARDED, TensorLayout, building
from megadit.registry import load_object


def parametrization(config: ModelConfig) -> Parametrization:
    """The parametrization of a model, with the initial values of ``model.init``."""
    path = family_spec(config.family).init.get(config.init_scheme)
    return Parametrization(config, FAN_IN_SCHEME if path is None else load_object(path))


def build_model(
    config: ModelConfig,
    parallel: TensorLayout | None = None,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
) -> StagedModel:
    """Build one model in float32, initialised; with ``parallel`` a tensor-parallel rank's shards of it.

    ``device``: default torch's default device. ``"meta"`` gives a model without memory or values: for counting, for
    specs, and for ``to_empty`` followed by ``megadit.mup.init.init_parameters``.

    Raises:
        ValueError: the tensor-parallel size does not divide the model's heads or channels.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    param = parametrization(config)
    with device, building(parallel):
        model: StagedModel = load_object(family_spec(config.family).model)(config, param)
        if config.repa is not None:
            model.repa, model.repa_block = RepaProjector(config.repa, param), config.repa.block
        model.layout = parallel or UNSHARDED
        if device.type != "meta":
            init_parameters(model, seed)
    return model


def count_parameters(model: nn.Module | ModelConfig, *, fixed: bool = True) -> int:
    """Number of parameters of a model or of a configuration, as published. Allocates no memory for a configuration.

    ``fixed``: count the fixed tables that are parameters in the original, too: the positions of DiT. The positions and
    the null caption of PixArt are buffers there, and never counted.
    """
    built = build_model(model, device="meta") if isinstance(model, ModelConfig) else model
    tables = getattr(built, "counted_tables", ()) if fixed else ()
    return sum(param.numel() for param in built.parameters()) + sum(built.get_buffer(name).numel() for name in tables)
