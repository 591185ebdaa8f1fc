"""How far a model and its copy in diffusers differ, measured on random inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError, one_line
from megadit.models.conversion import diffusers_of

TOLERANCE = 2e-5  # of float32 outputs, relative to the largest where that is above 1
_TIMES = (1.0, 250.0, 951.0)  # one sample each
_MEMORY = 1.25  # times the larger model's float32 weights: one model after the other, with what it computes
_MOST_TOKENS = 2**14  # of an image, with which attention still ends: those of 2048 pixels in the published models


@dataclass(frozen=True)
class Difference:
    """``maximum`` of |ours - diffusers'|, ``largest`` |ours|, and ``relative``, the one over the other.

    ``reason`` says why the two are different models, None where they are the same.
    """

    maximum: float
    relative: float
    largest: float
    reason: str | None

    @property
    def small(self) -> bool:
        """Whether it is float32's rounding and no more."""
        return self.maximum <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        if self.largest == 0.0:
            return "not measurable, since these weights, as of an untrained model, make all outputs 0"
        return (
            f"largest difference {self.maximum:.3g} of outputs up to {self.largest:.3g} (relative {self.relative:.3g})"
        )


def measure(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    diffusers_state: Mapping[str, Tensor],
    reason: str | None,
) -> Difference | None:
    """Build both models in float32, one after the other, and compare their outputs for three samples at three times.

    None where outputs are not finite numbers.

    Raises:
        UserError: diffusers' class does not take the config or the weights, or gives an output of another shape.
    """
    from megadit.mup.example import example_conditioning, example_images

    numbers = range(len(_TIMES))
    x, cond, t = example_images(config, numbers), example_conditioning(config, numbers), torch.tensor(_TIMES)
    diffusers = diffusers_of(config.family)
    if diffusers.attends_to_padding:  # and so takes no mask
        cond = cond.without_mask()
    with torch.no_grad():
        expected = _megadit_model(config, state)(x, t, cond)  # and the model is gone before the other is built
        (actual,) = _diffusers_model(config_json, diffusers_state)(x, return_dict=False, **diffusers.arguments(t, cond))
    if actual.shape != expected.shape:
        raise UserError(
            f"config.json: diffusers' {config_json['_class_name']} gives outputs of shape {list(actual.shape)}, the "
            f"model here {list(expected.shape)}; the two are not the same model"
        )
    maximum, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(maximum):
        return None
    return Difference(maximum, maximum / largest if largest else 0.0, largest, reason)


def not_measured(model: ModelConfig, elements: int) -> str | None:
    """Why a model of so many parameters is not compared here, in this machine's memory; None where it can be."""
    tokens = (model.input_size // model.patch_size) ** 2
    if tokens > _MOST_TOKENS:
        return f"its images of {model.input_size} x {model.input_size} have {tokens:,} tokens, too many to try out"
    activations = len(_TIMES) * tokens * model.width * (2 + model.mlp_ratio)  # of one block
    needed, free = 4 * (_MEMORY * elements + activations), psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"a model of it takes {needed / 1e9:.1f} GB, this machine has {free / 1e9:.1f} GB of memory free"


def _megadit_model(config: ModelConfig, state: Mapping[str, Tensor]) -> nn.Module:
    from megadit.models import build_model

    model = build_model(config, device="meta").to_empty(device="cpu")  # drawing weights that are not used takes long
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    missing = model.load_state_dict(dict(state), strict=False).missing_keys
    assert not set(missing) - dict(model.named_buffers()).keys(), missing  # the state dict was checked before
    return model.eval()


def _diffusers_model(config_json: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    from megadit.optional import import_diffusers

    diffusers = import_diffusers()
    name = str(config_json["_class_name"])
    options = {key: value for key, value in config_json.items() if not key.startswith("_")}
    try:
        model: nn.Module = getattr(diffusers, name)(**options)
        model.load_state_dict(dict(state), strict=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"config.json: diffusers' {name} does not take it ({reason}); the file is of another version"
        ) from error
    return model.float().eval()
