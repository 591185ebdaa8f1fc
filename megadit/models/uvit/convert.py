"""Conversion of U-ViT: class, text and unconditional checkpoints of baofff/U-ViT. diffusers has no such class.

Official parameter names are those of this model, but for the learned positions: ``pos_embed`` there,
``pos_embed.weight`` here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError
from megadit.models.conversion import LATENT_CHANNELS, Conversion, key_maps

_OFFICIAL = "an official U-ViT checkpoint"
_HEADS = {1152: 16, 1024: 16, 768: 12, 512: 8}  # the published sizes, by width
_HEAD_DIMS = (72, 64)  # of H, and of the others
_CLIP_TOKENS = 77  # text tokens of the published MS-COCO models
_READOUT = "decoder_pred.weight"
_TABLE = "label_emb.weight"
_POSITIONS = ("pos_embed", "pos_embed.weight")  # official name, name here
_FALSE, _TRUE = ("false", "no", "0"), ("true", "yes", "1")


def from_official(state: Mapping[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of an official U-ViT; sizes are inferred from the tensors.

    Hints: ``heads`` (default: of the published sizes, else width / 72 or width / 64 where only one is whole);
    ``input_size`` or ``text_max_length`` of a text model, whose positions are one table for both (default: 77 tokens,
    where the rest are a square); ``null_class=false`` for a model without guidance whose every label is a class, such
    as the published ImageNet-64 ones: it gets one more row of zeros, for the null label that this model has.

    Raises:
        UserError: names, shapes or types are not those of a U-ViT, or a hint is needed or wrong.
    """
    width, channels, patch, _ = key_maps.required(state, "patch_embed.proj.weight", _OFFICIAL, 4).shape
    hidden = len(key_maps.required(state, "mid_block.mlp.fc1.weight", _OFFICIAL, 2))
    out = len(key_maps.required(state, _READOUT, _OFFICIAL, 2)) // patch**2
    positions = key_maps.required(state, _POSITIONS[0], _OFFICIAL, 3).shape[1]
    state = {_POSITIONS[1] if name == _POSITIONS[0] else name: value for name, value in state.items()}
    state = _with_null(state, _truth(hints.get("null_class", True)))
    text: dict[str, Any] | None = None
    classes = len(key_maps.required(state, _TABLE, _OFFICIAL, 2)) - 1 if _TABLE in state else 0
    side, length = _layout(positions, patch, classes, "context_embed.weight" in state, hints)
    if length:
        text = {
            "dim": key_maps.required(state, "context_embed.weight", _OFFICIAL, 2).shape[1],
            "max_length": length,
            "mask": False,  # the original sees all of CLIP's tokens
        }
    heads = key_maps.infer_heads(width, hints.get("heads"), _HEADS, _HEAD_DIMS)
    config = ModelConfig.model_validate(
        {
            "family": "uvit",
            "width": width,
            "depth": 2 * key_maps.count_blocks(state, "in_blocks."),
            "heads": heads,
            "patch_size": patch,
            "in_channels": channels,
            "input_size": side * patch,
            "learn_sigma": key_maps.learns_sigma(out, channels, "a U-ViT"),
            "mlp": "gelu",
            "mlp_ratio": hidden / width,
            "qkv_bias": "mid_block.attn.qkv.bias" in state,
            "num_classes": classes,
            "text": text,
            "conv": "final_layer.weight" in state,
            "mlp_time_embed": "time_embed.0.weight" in state,
        }
    )
    shapes = key_maps.model_shapes(config)
    key_maps.check_state_dict(state, shapes, _OFFICIAL)
    return config, {name: state[name] for name in shapes}


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the official class loads; the readout's multiplier is folded.

    Raises:
        UserError: the official class has no place for something of this model.
    """
    unsupported = {
        f"model.qk_norm: {config.qk_norm}": config.qk_norm != "none",
        f"model.mlp: {config.mlp}": config.mlp != "gelu",
        "model.learn_sigma: true": config.learn_sigma,
    }
    key_maps.refuse_unsupported(unsupported, "the official U-ViT")
    official = {**state, _READOUT: key_maps.fold_readout(config, state[_READOUT])}
    return {_POSITIONS[0] if name == _POSITIONS[1] else name: value for name, value in official.items()}


def _layout(positions: int, patch: int, classes: int, text: bool, hints: Mapping[str, Any]) -> tuple[int, int]:
    """(patches along a side, text tokens), from the number of positions and the hints."""
    remaining = positions - 1 - (1 if classes else 0)  # patches and text
    given = {key: int(hints[key]) for key in ("input_size", "text_max_length") if key in hints}
    length = 0
    if text:
        length = given.get("text_max_length", _CLIP_TOKENS)
        if "text_max_length" not in given and "input_size" in given:
            length = remaining - (given["input_size"] // patch) ** 2
    side = math.isqrt(max(remaining - length, 0))
    wrong_size = given.get("input_size", side * patch) != side * patch
    if (text and length < 1) or side < 1 or side**2 != remaining - length or wrong_size:
        given_hints = ", ".join(f"{key}={value}" for key, value in given.items())
        remedy = "give --hint text_max_length=N or --hint input_size=N that fit" if text else "give other hints or none"
        raise UserError(
            f"IN: pos_embed has {positions} positions, which are no square of patches beside the other tokens"
            f"{f' with {given_hints}' if given_hints else f', {length} of them text' if text else ''}; {remedy}"
        )
    return side, length


def _with_null(state: Mapping[str, Tensor], has_null: bool) -> dict[str, Tensor]:
    table = key_maps.optional(state, _TABLE, _OFFICIAL, 2)
    if has_null or table is None:
        return dict(state)
    return {**state, _TABLE: torch.cat([table, torch.zeros_like(table[:1])])}


def _truth(value: Any) -> bool:
    text = str(value).lower()
    if text not in (*_FALSE, *_TRUE):
        raise UserError(f"--hint null_class: {value} is neither true nor false; give one of the two")
    return text in _TRUE


def _defaults(model: ModelConfig) -> dict[str, dict[str, Any]]:
    latents = {"beta_schedule": "scaled_linear"} if model.in_channels in LATENT_CHANNELS else {}  # of all its originals
    return {"objective": {"kind": "ddpm", **latents}, "sample": {"guidance": 1.4}}


CONVERSION = Conversion(
    from_official,
    to_official,
    anchor="patch_embed.proj.weight",
    name_prefix="in_blocks.",
    defaults=_defaults,
    hints=("heads", "input_size", "text_max_length", "null_class"),
    notes=(
        "the originals number their 1000 steps from 1 (of latents) or train at any time between (of pixels); here "
        "steps are 0 to 999",
    ),
)
