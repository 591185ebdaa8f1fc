"""Conversion of DiT: facebookresearch/DiT, the muP repository of arXiv 2505.15270, diffusers' DiTTransformer2DModel.

Parameter names are the official ones, which add the fixed table ``pos_embed``. diffusers' class has a copy of the
embedders in every block and spaces the timestep's frequencies by half - 1 in place of half, so that no DiT is
exactly equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megadit.config.schema.model import LARGEST, ModelConfig
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion import Conversion, DiffusersModel, key_maps
from megadit.models.conversion.diffusers_class import LEGACY_DEFAULTS, WHERE, Renaming, check_depth, image_size
from megadit.models.layers import sincos_2d

_OFFICIAL = "an official DiT checkpoint"
_CLASS = "DiTTransformer2DModel"
_DIFFUSERS = f"a {_CLASS} of diffusers"
_CLASS_DEFAULTS = {
    **LEGACY_DEFAULTS, "out_channels": None, "sample_size": 32, "norm_type": "ada_norm_zero", "norm_eps": 1e-5,
}  # fmt: skip
_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # the published sizes, by width
_HEAD_DIMS = (72, 64)  # of DiT-XL and of the muP repository at every width; of the others
_READOUT = "final_layer.linear.weight"
_NAMES = Renaming(
    ends={
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
    block={
        "adaLN_modulation.1": "norm1.linear",
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
)
# Shared here; diffusers has a copy in every block.
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
_ACTIVATIONS: Mapping[str, Literal["gelu_tanh", "gelu"]] = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}


def from_official(state: Mapping[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of an official DiT; width, depth, patch, channels, classes and the variance are inferred.

    Hints: ``heads`` (default: of the published sizes, else width / 72 or width / 64 where only one is whole),
    ``input_size`` (needed where ``pos_embed`` is not stored), and ``parametrization=mup`` with ``base_width``
    (default 288) and ``output_mult`` for checkpoints of the muP repository, whose readout is multiplied in the
    forward pass by output_mult * base_width / width.

    Raises:
        UserError: names, shapes, types or the position table are not those of a DiT, or a hint is needed or wrong.
    """
    patch_weight = key_maps.required(state, "x_embedder.proj.weight", _OFFICIAL, 4)
    width, channels, patch, _ = patch_weight.shape
    classes = len(key_maps.required(state, "y_embedder.embedding_table.weight", _OFFICIAL, 2)) - 1
    hidden = len(key_maps.required(state, "blocks.0.mlp.fc1.weight", _OFFICIAL, 2))
    out = len(key_maps.required(state, _READOUT, _OFFICIAL, 2)) // patch**2
    heads = key_maps.infer_heads(width, hints.get("heads"), _HEADS, _HEAD_DIMS)
    table = key_maps.optional(state, "pos_embed", _OFFICIAL, 3)
    keys: dict[str, Any] = {
        "width": width,
        "depth": key_maps.count_blocks(state, "blocks."),
        "patch_size": patch,
        "in_channels": channels,
        "num_classes": classes,
        "learn_sigma": key_maps.learns_sigma(out, channels, "a DiT"),
        "mlp_ratio": hidden / width,
        "input_size": key_maps.infer_input_size(table, patch, hints.get("input_size")),
    }
    config = ModelConfig(family="dit", **keys, **key_maps.parametrization_keys(hints, width, heads))
    if table is not None:
        key_maps.check_positions(table, _positions(config), "pos_embed")
    state = {name: value for name, value in state.items() if name != "pos_embed"}
    key_maps.check_state_dict(state, key_maps.model_shapes(config), _OFFICIAL)
    return config, state


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the official class loads, ``pos_embed`` included; the readout's multiplier is folded.

    Raises:
        UserError: the official class has no place for something of this model.
    """
    _refuse(config, "the official DiT", ("gelu_tanh",))
    official = {**state, _READOUT: key_maps.fold_readout(config, state[_READOUT])}
    return {"pos_embed": _positions(config), **official}


def to_diffusers(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of a DiTTransformer2DModel; the embedders stand in every block.

    Raises:
        UserError: the class has no place for something of this model.
    """
    _refuse(config, f"diffusers' {_CLASS}", ("gelu_tanh", "gelu"))
    if config.mlp_ratio != 4.0:
        raise UserError(f"model.mlp_ratio: {config.mlp_ratio:g}, but diffusers' {_CLASS} has 4 alone; nothing is done")
    folded = {**state, _READOUT: key_maps.fold_readout(config, state[_READOUT])}
    embedders = {target: folded.pop(name) for name, target in _EMBEDDERS.items()}
    renamed = _NAMES.to_diffusers(folded)
    for index in range(config.depth):
        renamed |= {f"transformer_blocks.{index}.{target}": value for target, value in embedders.items()}
    return _to_json(config), renamed


def from_diffusers(
    config_json: Mapping[str, Any], state: Mapping[str, Tensor], *, where: str = WHERE
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a DiTTransformer2DModel, whose blocks must all hold the same embedders.

    ``where`` names the config in messages.

    Raises:
        UserError: names or shapes differ from what the config says, blocks hold different embedders, or the config
            asks for something that this model does not have.
    """
    fields = Fields({**_CLASS_DEFAULTS, **config_json}, where)
    check_depth(fields, key_maps.count_blocks(state, "transformer_blocks."))
    config = _from_json(fields)
    shapes = key_maps.model_shapes(config)
    _, expected = to_diffusers(config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    key_maps.check_state_dict(state, {name: tuple(value.shape) for name, value in expected.items()}, _DIFFUSERS)
    weights = _NAMES.from_diffusers(shapes.keys() - _EMBEDDERS.keys(), state)
    weights |= {name: _shared_value(state, target, config.depth) for name, target in _EMBEDDERS.items()}
    return config, {name: weights[name] for name in shapes}


def diffusers_gap(config_json: Mapping[str, Any], where: str) -> str | None:
    """Why the class of diffusers with this config computes something else than this model does."""
    mismatch = "its class spaces the timestep's frequencies by half - 1 in place of half"
    eps = Fields({**_CLASS_DEFAULTS, **config_json}, where).number("norm_eps")
    return mismatch if eps == 1e-6 else f"{mismatch}, and its norm_eps is {eps:g} in place of 1e-06"


def _positions(config: ModelConfig) -> Tensor:
    side = config.input_size // config.patch_size
    return sincos_2d(config.width, side, side)[None]


def _refuse(config: ModelConfig, target: str, activations: tuple[str, ...]) -> None:
    """Raise UserError for a setting that ``target`` does not have."""
    unsupported = {
        f"model.qk_norm: {config.qk_norm}": config.qk_norm != "none",
        "model.qkv_bias: false": not config.qkv_bias,
        f"model.mlp: {config.mlp}": config.mlp not in activations,
        "model.num_classes: 0": not config.num_classes,
    }
    key_maps.refuse_unsupported(unsupported, target)


def _to_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "_class_name": _CLASS,
        "activation_fn": "gelu-approximate" if config.mlp == "gelu_tanh" else "gelu",
        "attention_bias": True,
        "attention_head_dim": config.head_channels,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": False,
    }


def _from_json(fields: Fields) -> ModelConfig:
    """The config of a config.json. Raises UserError for what a DiT here does not have."""
    for key, expected in (("norm_type", "ada_norm_zero"), ("attention_bias", True), ("norm_elementwise_affine", False)):
        value = fields.text(key) if isinstance(expected, str) else fields.flag(key)
        if value != expected:
            raise UserError(f"{fields.where} has {key} {shown(value)}, a DiT has {shown(expected)}; it cannot be read")
    activation = fields.text("activation_fn")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{fields.where} has activation_fn {shown(activation)}, known are {', '.join(_ACTIVATIONS)}; nothing else "
            "can be read"
        )
    fields.number("norm_eps")  # of ``diffusers_gap``
    channels, patch = (fields.integer(key, least=1, most=LARGEST) for key in ("in_channels", "patch_size"))
    heads = fields.integer("num_attention_heads", least=1, most=LARGEST)
    out = fields.integer("out_channels", None, least=1, null=True)
    return ModelConfig(
        family="dit",
        width=heads * fields.integer("attention_head_dim", least=1, most=LARGEST),
        depth=fields.integer("num_layers", least=1),
        heads=heads,
        patch_size=patch,
        in_channels=channels,
        input_size=image_size(fields, patch),
        learn_sigma=key_maps.learns_sigma(out or channels, channels, "a DiT"),
        mlp=_ACTIVATIONS[activation],
        num_classes=fields.integer("num_embeds_ada_norm", least=1),
    )


def _shared_value(state: Mapping[str, Tensor], name: str, depth: int) -> Tensor:
    """The tensor ``name`` of every block, which must be equal in all. Raises UserError where one differs."""
    first = state[f"transformer_blocks.0.{name}"]
    for index in range(1, depth):
        if not torch.equal(state[f"transformer_blocks.{index}.{name}"], first):
            raise UserError(
                f"IN: transformer_blocks.{index}.{name} differs from that of block 0, a DiT has one for all blocks; "
                "the file was trained as another model, which cannot be read"
            )
    return first


def _defaults(model: ModelConfig) -> dict[str, dict[str, Any]]:
    guided = {"guidance_channels": 3} if model.in_channels > 3 else {}  # as the original's own sampling does
    return {"objective": {"kind": "ddpm"}, "sample": {"guidance": 4.0, **guided}}


CONVERSION = Conversion(
    from_official,
    to_official,
    anchor="x_embedder.proj.weight",
    name_prefix="y_embedder.embedding_table.",
    defaults=_defaults,
    hints=("heads", "input_size", "parametrization", "base_width", "output_mult"),
    diffusers=DiffusersModel(
        _CLASS,
        _CLASS_DEFAULTS,
        to_diffusers,
        from_diffusers,
        lambda t, cond: {"timestep": t.long(), "class_labels": cond.labels},
        pipeline="DiTPipeline",
        ddpm_scheduler="DDIMScheduler",
        null_label=1000,
        mismatch=diffusers_gap,
    ),
)
