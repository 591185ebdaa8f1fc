"""``config.json`` of a transformer of diffusers: its class, and which of its keys that class takes.

Every key is read by the family's module, refused, or noted. Files older than diffusers 0.28 name
``Transformer2DModel``; as in diffusers, their ``norm_type`` decides as which class they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion import diffusers_classes, diffusers_of
from megadit.models.conversion.key_maps import listed

LEGACY = "Transformer2DModel"
WHERE = "IN: config.json"  # how messages name the file by default
# Defaults of the classes that were split off from the old one.
LEGACY_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "num_layers": 28, "dropout": 0.0,
        "norm_num_groups": 32, "attention_bias": True, "patch_size": 2, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "upcast_attention": False, "norm_elementwise_affine": False,
    }
)  # fmt: skip
# Keys of the old class that the new ones do not have, with the values at which they change nothing.
_LEGACY_KEYS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "num_vector_embeds": (None,), "use_linear_projection": (False,), "only_cross_attention": (False,),
        "double_self_attention": (False,), "cross_attention_dim": (None,), "interpolation_scale": (None, 1),
        "use_additional_conditions": (None, False), "caption_channels": (None,), "attention_type": ("default",),
    }
)  # fmt: skip
# Keys without effect on the outputs in evaluation mode and full precision: noted where they differ from the model here.
_NOTED: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "dropout": (0.0, "there is none here"),
        "upcast_attention": (False, "model.attention_precision=fp32 does so here"),
    }
)


def class_config(fields: Fields) -> tuple[dict[str, Any], list[str]]:
    """The keys of config.json that its class has, with the class's current name, and notes on the keys left out.

    Raises:
        UserError: its class is not known, its weights are quantized, or a key asks for another computation.
    """
    name = _class_name(fields)
    if fields.raw("quantization_config") is not None:
        raise UserError(
            f"{fields.where} has a quantization_config, and quantized weights cannot be read; give the model in "
            "float32, float16 or bfloat16"
        )
    defaults = diffusers_of(diffusers_classes()[name]).defaults
    for key, values in _LEGACY_KEYS.items():
        value = fields.raw(key)
        if key in fields and key not in defaults and value not in values:
            raise UserError(f"{fields.where} has {key} {shown(value)}, which a {name} does not have; it cannot be read")
    class_keys = {key: fields.raw(key) for key in fields.names() if key in defaults or key[:1] == "_"}
    notes = []
    for key, (here, why) in _NOTED.items():
        if key in defaults:
            value = fields.number(key, 0.0) if key == "dropout" else fields.flag(key, False)
            if value != here:
                notes.append(f"{key} {shown(value)} of its config.json is left out: {why}")
    unknown = [f"{key}={shown(value)}" for key, value in fields.unread().items() if value is not None]
    if unknown:
        notes.append(f"of its config.json are left out, since a {name} does not have them: {listed(unknown)}")
    return {**class_keys, "_class_name": name}, notes


def image_size(fields: Fields, patch: int) -> int:
    """``sample_size``: the side of a square image. Raises UserError for another, or one that ``patch`` does not cut."""
    value = fields.raw("sample_size")
    if isinstance(value, list | tuple):
        raise UserError(
            f"{fields.where} has sample_size {shown(list(value))}, and models here have square images; it cannot be "
            "read"
        )
    size = fields.integer("sample_size", least=1, most=2**16)
    if size % patch:
        raise UserError(
            f"{fields.where} has sample_size {size}, which its patch_size {patch} does not divide; it cannot be read"
        )
    return size


def check_depth(fields: Fields, blocks: int) -> None:
    """Raise UserError unless ``num_layers`` is ``blocks``, the number in the weights."""
    depth = fields.integer("num_layers", least=1)
    if depth != blocks:
        raise UserError(
            f"{fields.where} has num_layers {depth}, but the weights beside it have {blocks} blocks; copy the whole "
            "folder again"
        )


def _class_name(fields: Fields) -> str:
    name = fields.text("_class_name")
    if name == LEGACY:
        norm = fields.raw("norm_type")
        models = map(diffusers_of, diffusers_classes().values())
        classes = {each.defaults["norm_type"]: each.class_name for each in models if "norm_type" in each.defaults}
        class_name = classes.get(norm) if isinstance(norm, str) else None
        if class_name is None:
            raise UserError(
                f"{fields.where} is of a {LEGACY} with norm_type {shown(norm)}; known are {', '.join(classes)}: it "
                "cannot be read"
            )
        return class_name
    known = diffusers_classes()
    if name not in known:
        raise UserError(
            f"{fields.where} has _class_name {name}; known are {', '.join(known)}: give a transformer of one of these"
        )
    return name


@dataclass(frozen=True)
class Renaming:
    """Maps megadit's parameter names to those of a class of diffusers, which may cut a tensor along dimension 0.

    ends, block: megadit's name of a module, or of a parameter, to its names in diffusers, separated by spaces; outside
    of blocks, and inside of a block. blocks: prefix of megadit's blocks.
    """

    ends: Mapping[str, str]
    block: Mapping[str, str]
    blocks: str = "blocks."

    def target_names(self, name: str) -> list[str]:
        """The names in diffusers of the pieces of the parameter ``name``, in order."""
        table, prefix, local = self.ends, "", name
        if name.startswith(self.blocks):
            index, _, local = name.removeprefix(self.blocks).partition(".")
            table, prefix = self.block, f"transformer_blocks.{index}."
        module, _, parameter = local.rpartition(".")
        targets = table[local].split() if local in table else [f"{t}.{parameter}" for t in table[module].split()]
        return [prefix + target for target in targets]

    def to_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, cut and renamed."""
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            targets = self.target_names(name)
            renamed |= dict(zip(targets, value.chunk(len(targets)), strict=True))
        return renamed

    def from_diffusers(self, names: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters ``names`` of megadit, joined from the tensors of diffusers' ``state``."""
        pieces = {name: [state[target] for target in self.target_names(name)] for name in names}
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in pieces.items()}
