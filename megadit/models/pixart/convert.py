"""Conversion of PixArt-alpha: PixArt-alpha/PixArt-alpha, the muP repository of arXiv 2505.15270, and diffusers.

Parameter names are the official ones, which add the fixed table ``pos_embed``. diffusers' PixArtTransformer2DModel has
other names, no place for the null caption (its pipelines take it as ``negative_prompt_embeds``) and is otherwise
exactly equal. The variants for 1024 pixels, conditioned on the resolution and aspect ratio, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megadit.conditioning import null_caption
from megadit.config.schema.model import LARGEST, ModelConfig, TextInput
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion import Conversion, DiffusersModel, key_maps
from megadit.models.conversion.diffusers_class import LEGACY_DEFAULTS, WHERE, Renaming, check_depth, image_size
from megadit.models.layers import sincos_2d
from megadit.models.repa import without_projector

NULL_CAPTION = "y_embedder.y_embedding"
_OFFICIAL = "an official PixArt checkpoint"
_CLASS = "PixArtTransformer2DModel"
_DIFFUSERS = f"a {_CLASS} of diffusers"
_CLASS_DEFAULTS = {
    **LEGACY_DEFAULTS, "out_channels": 8, "sample_size": 128, "norm_type": "ada_norm_single", "norm_eps": 1e-6,
    "cross_attention_dim": 1152, "interpolation_scale": None, "use_additional_conditions": None,
    "caption_channels": None, "attention_type": "default",
}  # fmt: skip
_HEAD_DIMS = (72,)  # of the published width 1152, and of the muP repository at every width
_MAX_LENGTH = 120  # tokens of the published models' captions
_LENGTH_KEY = "_text_max_length"  # in our config.json; diffusers passes over keys that begin so
_MOST_LENGTH = 2**14  # tokens: what is asked for is memory of the null caption
_READOUT = "final_layer.linear.weight"
_MICRO = ("csize_embedder.", "ar_embedder.")
_DIFFUSERS_MICRO = ("adaln_single.emb.resolution_embedder.", "adaln_single.emb.aspect_ratio_embedder.")
_NAMES = Renaming(
    ends={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
    },
    block={
        "scale_shift_table": "scale_shift_table",
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
)
_ACTIVATIONS: Mapping[str, Literal["gelu_tanh", "gelu"]] = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}


def from_official(state: Mapping[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights, null caption included, of an official PixArt; sizes and the variance are inferred.

    Hints: ``heads`` (default: width / 72, as published and in the muP repository), ``input_size`` and
    ``pos_scale`` (default: what the stored ``pos_embed`` tells; without it the size is needed and the scale is 1),
    ``text_max_length`` (default 120; used where no null caption is stored, whose place a keyed one takes), and
    ``parametrization=mup`` with ``base_width`` (default 288) and ``output_mult`` for checkpoints of the muP
    repository, whose readout is multiplied in the forward pass by output_mult * base_width / width.

    Raises:
        UserError: names, shapes, types or positions are not those of a PixArt for 256 or 512 pixels, or a hint is
            needed or wrong.
    """
    _refuse_micro_conditions(state, _MICRO)
    width, channels, patch, _ = key_maps.required(state, "x_embedder.proj.weight", _OFFICIAL, 4).shape
    hidden = len(key_maps.required(state, "blocks.0.mlp.fc1.weight", _OFFICIAL, 2))
    out = len(key_maps.required(state, _READOUT, _OFFICIAL, 2)) // patch**2
    text_dim = key_maps.required(state, "y_embedder.y_proj.fc1.weight", _OFFICIAL, 2).shape[1]
    length = int(hints.get("text_max_length", _MAX_LENGTH))
    if NULL_CAPTION in state:
        length = len(key_maps.required(state, NULL_CAPTION, _OFFICIAL, 2))
    size, scale = _grid(key_maps.optional(state, "pos_embed", _OFFICIAL, 3), patch, hints)
    heads = key_maps.infer_heads(width, hints.get("heads"), {}, _HEAD_DIMS)
    keys: dict[str, Any] = {
        "family": "pixart",
        "width": width,
        "depth": key_maps.count_blocks(state, "blocks."),
        "patch_size": patch,
        "in_channels": channels,
        "input_size": size,
        "learn_sigma": key_maps.learns_sigma(out, channels, "a PixArt"),
        "mlp_ratio": hidden / width,
        "num_classes": 0,
        "text": {"dim": text_dim, "max_length": length},
        "pos_scale": scale,
        **key_maps.parametrization_keys(hints, width, heads),
    }
    config = ModelConfig.model_validate(keys)
    weights = {name: value for name, value in state.items() if name != "pos_embed"}
    weights.setdefault(NULL_CAPTION, _null(config, {}))
    key_maps.check_state_dict(weights, _shapes(config), _OFFICIAL)
    return config, weights


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the official class loads, ``pos_embed`` included; multipliers are folded into the weights.

    Where ``state`` lacks the null caption (a run's checkpoint holds parameters alone), the default one is written.

    Raises:
        UserError: the official class has no place for something of this model.
    """
    _refuse(config, "the official PixArt", ("gelu_tanh",), bias=True)
    folded = _folded(config, state)
    side = config.input_size // config.patch_size
    positions = sincos_2d(config.width, side, side, scale=config.pos_scale)[None]
    return {"pos_embed": positions, **folded, NULL_CAPTION: _null(config, state)}


def to_diffusers(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of a PixArtTransformer2DModel, which has no place for the null caption.

    Raises:
        UserError: the class has no place for something of this model.
    """
    _refuse(config, f"diffusers' {_CLASS}", ("gelu_tanh", "gelu"), bias=False)
    if config.mlp_ratio != 4.0:
        raise UserError(f"model.mlp_ratio: {config.mlp_ratio:g}, but diffusers' {_CLASS} has 4 alone; nothing is done")
    return _to_json(config), _NAMES.to_diffusers(_folded(config, state))


def from_diffusers(
    config_json: Mapping[str, Any], state: Mapping[str, Tensor], *, where: str = WHERE, max_length: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a PixArtTransformer2DModel. ``where`` names the config in messages.

    ``max_length``: tokens of a caption, which the class does not know; default: what ``to_diffusers`` noted in the
    config, else 120. The null caption is the default one (``megadit.conditioning.null_caption``), which the pipelines
    do not use: they encode an empty text.

    Raises:
        UserError: names or shapes differ from what the config says, or the config asks for something that this model
            does not have.
    """
    _refuse_micro_conditions(state, _DIFFUSERS_MICRO)
    fields = Fields({**_CLASS_DEFAULTS, **config_json}, where)
    check_depth(fields, key_maps.count_blocks(state, "transformer_blocks."))
    config = _from_json(fields, max_length)
    state = {name: value for name, value in state.items() if name != "pos_embed.pos_embed"}  # older versions store it
    shapes = key_maps.model_shapes(config)
    _, expected = to_diffusers(config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    key_maps.check_state_dict(state, {name: tuple(value.shape) for name, value in expected.items()}, _DIFFUSERS)
    return config, {**_NAMES.from_diffusers(shapes, state), NULL_CAPTION: _null(config, {})}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters and of its null caption."""
    assert config.text is not None
    return {**key_maps.model_shapes(config), NULL_CAPTION: (config.text.max_length, config.text.dim)}


def _null(config: ModelConfig, state: Mapping[str, Tensor]) -> Tensor:
    assert config.text is not None
    stored = state.get(NULL_CAPTION)
    return null_caption(config.text.max_length, config.text.dim) if stored is None else stored


def _folded(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters alone, without a REPA projector and the null caption, multipliers folded in."""
    parameters = {name: value for name, value in without_projector(state).items() if name != NULL_CAPTION}
    _, folded = key_maps.fold_roles(config, parameters)
    return {**folded, _READOUT: key_maps.fold_readout(config, folded[_READOUT])}


def _grid(table: Tensor | None, patch: int, hints: Mapping[str, Any]) -> tuple[int, float]:
    """(side of the image, scale of the positions): of the stored table, which hints must agree with, or the hints."""
    size = key_maps.infer_input_size(table, patch, hints.get("input_size"))
    if table is None:
        return size, float(hints.get("pos_scale", 1.0))
    side, width = size // patch, table.shape[-1]
    # Token 1 is at column 1; the first frequency is 1, so that the first sine and cosine are those of 1 / scale.
    angle = float(torch.atan2(table[0, 1, 0].double(), table[0, 1, width // 4].double())) if side > 1 else 1.0
    scale = float(hints["pos_scale"]) if "pos_scale" in hints else round(1 / angle, 2) if angle > 0 else 1.0
    expected = sincos_2d(width, side, side, scale=scale)[None]
    tolerance = 1e-5 if table.dtype in (torch.float32, torch.float64) else 1e-2
    if table.shape != expected.shape or not torch.allclose(table.float(), expected, rtol=0, atol=tolerance):
        raise UserError(
            f"IN: its pos_embed is not the sin-cos table of PixArt at pos_scale {scale:g}, so that the model would see "
            "other positions than it was trained with; give --hint pos_scale=N if it was scaled, or another file"
        )
    return size, scale


def _refuse_micro_conditions(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> None:
    micro = next((name for name in state if name.startswith(prefixes)), None)
    if micro is not None:
        raise UserError(
            f"IN: is a PixArt for 1024 pixels: it has {micro}, an embedder of resolution and aspect ratio, which this "
            "model does not have; give a checkpoint for 256 or 512 pixels"
        )


def _refuse(config: ModelConfig, target: str, activations: tuple[str, ...], *, bias: bool) -> None:
    """Raise UserError for a setting that ``target`` does not have. ``bias``: it requires ``qkv_bias``."""
    unsupported = {
        f"model.qk_norm: {config.qk_norm}": config.qk_norm != "none",
        f"model.mlp: {config.mlp}": config.mlp not in activations,
        "model.qkv_bias: false": bias and not config.qkv_bias,
    }
    key_maps.refuse_unsupported(unsupported, target)


def _to_json(config: ModelConfig) -> dict[str, Any]:
    assert config.text is not None
    return {
        "_class_name": _CLASS,
        _LENGTH_KEY: config.text.max_length,
        "activation_fn": next(name for name, activation in _ACTIVATIONS.items() if activation == config.mlp),
        "attention_bias": config.qkv_bias,
        "attention_head_dim": config.head_channels,
        "attention_type": "default",
        "caption_channels": config.text.dim,
        "cross_attention_dim": config.width,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": config.pos_scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": False,
        "use_additional_conditions": False,
    }


def _from_json(fields: Fields, max_length: int | None) -> ModelConfig:
    """The config of a config.json. Raises UserError for what a PixArt here does not have."""
    channels, patch, heads = (
        fields.integer(key, least=1, most=LARGEST) for key in ("in_channels", "patch_size", "num_attention_heads")
    )
    size = image_size(fields, patch)
    additional = fields.flag("use_additional_conditions", None, null=True)
    if additional or (additional is None and size == 128):
        raise UserError(
            f"{fields.where} has use_additional_conditions (the default at sample_size 128): a PixArt for 1024 pixels, "
            "told the resolution and aspect ratio, which this model is not; give one for 256 or 512 pixels"
        )
    width = heads * fields.integer("attention_head_dim", least=1, most=LARGEST)
    _check_fixed(fields, width)
    if fields.raw("caption_channels") is None:
        raise UserError(f"{fields.where} has no caption_channels, so it is not a PixArt; give another folder")
    activation = fields.text("activation_fn")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{fields.where} has activation_fn {shown(activation)}, known are {known}; it cannot be read")
    scale = fields.number("interpolation_scale", None, above=0.0, null=True)
    out = fields.integer("out_channels", None, least=1, null=True)
    length = fields.integer(_LENGTH_KEY, _MAX_LENGTH, least=1, most=_MOST_LENGTH)
    dim = fields.integer("caption_channels", least=1, most=LARGEST)
    return ModelConfig(
        family="pixart",
        width=width,
        depth=fields.integer("num_layers", least=1),
        heads=heads,
        patch_size=patch,
        in_channels=channels,
        input_size=size,
        learn_sigma=key_maps.learns_sigma(out or channels, channels, "a PixArt"),
        mlp=_ACTIVATIONS[activation],
        qkv_bias=fields.flag("attention_bias"),
        num_classes=0,
        text=TextInput(dim=dim, max_length=max_length or length),
        pos_scale=float(max(size // 64, 1) if scale is None else scale),
    )


def _check_fixed(fields: Fields, width: int) -> None:
    """Raise UserError for a key that has another value than in every PixArt."""
    values: dict[str, tuple[Any, Any]] = {
        "norm_type": (fields.text("norm_type"), "ada_norm_single"),
        "norm_elementwise_affine": (fields.flag("norm_elementwise_affine"), False),
        "norm_eps": (fields.number("norm_eps"), 1e-6),
        "attention_type": (fields.text("attention_type"), "default"),
        "cross_attention_dim": (fields.integer("cross_attention_dim"), width),
    }
    for key, (value, expected) in values.items():
        if value != expected:
            raise UserError(
                f"{fields.where} has {key} {shown(value)}, a PixArt has {shown(expected)}; it cannot be read"
            )


CONVERSION = Conversion(
    from_official,
    to_official,
    anchor="x_embedder.proj.weight",
    name_prefix="y_embedder.y_proj.",
    defaults=lambda model: {"objective": {"kind": "ddpm"}, "sample": {"guidance": 4.5}},
    hints=("heads", "input_size", "text_max_length", "pos_scale", "parametrization", "base_width", "output_mult"),
    weights_key="state_dict",
    diffusers=DiffusersModel(
        _CLASS,
        _CLASS_DEFAULTS,
        to_diffusers,
        from_diffusers,
        lambda t, cond: {
            "timestep": t,
            "encoder_hidden_states": cond.text,
            "encoder_attention_mask": cond.text_mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        pipeline="PixArtAlphaPipeline",
        components={
            "tokenizer": ["transformers", "T5Tokenizer"],
            "text_encoder": ["transformers", "T5EncoderModel"],
        },
    ),
)
