"""From a configuration to a model: families by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from megadit.config.schema.model import ModelConfig
from megadit.models.repa import build_projector
from megadit.models.stages import StagedModel
from megadit.mup.init import init_parameters
from megadit.parallel.tensor import WHOLE, TensorLayout, building

# Module and class of each family, imported when one is built.
FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "dit": ("megadit.models.dit.model", "DiT"),
        "pixart": ("megadit.models.pixart.model", "PixArt"),
        "uvit": ("megadit.models.uvit.model", "UViT"),
        "mmdit": ("megadit.models.mmdit.model", "MMDiT"),
    }
)


def family(name: str) -> Callable[[ModelConfig], StagedModel]:
    """The class of a family."""
    module, class_name = FAMILIES[name]
    model: Callable[[ModelConfig], StagedModel] = getattr(importlib.import_module(module), class_name)
    return model


def build_model(
    config: ModelConfig,
    parallel: TensorLayout | None = None,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
) -> StagedModel:
    """Build one model in float32, initialised: whole, or a tensor-parallel rank's share of it (``parallel``).

    ``device``: by default torch's, so that ``with torch.device(…)`` holds here too. ``"meta"`` gives a model without
    memory or values: for counting, for specs, and for ``to_empty`` followed by ``megadit.mup.init_parameters``.

    Raises:
        ValueError: the layout's ranks do not divide the model's heads or channels.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    with device, building(parallel):
        model = family(config.family)(config)
        model.repa = build_projector(config)
        model.repa_block = config.repa.block if config.repa is not None else 0
        model.layout = parallel or WHOLE
        if device.type != "meta":
            init_parameters(model, seed)
    return model


def count_parameters(model: nn.Module | ModelConfig, *, fixed: bool = True) -> int:
    """Number of parameters of a model or (without memory) of a configuration, as published.

    ``fixed`` counts beside the trained ones the fixed tables that the original holds as parameters: the positions of
    DiT. Those of PixArt and its null caption are buffers there and in no count.
    """
    built = build_model(model, device="meta") if isinstance(model, ModelConfig) else model
    tables = getattr(built, "counted_tables", ()) if fixed else ()
    return sum(param.numel() for param in built.parameters()) + sum(built.get_buffer(name).numel() for name in tables)
