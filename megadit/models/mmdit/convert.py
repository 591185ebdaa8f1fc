"""Conversion of MMDiT: Stable Diffusion 3's own checkpoints, and diffusers' SD3Transformer2DModel.

Parameter names are the official ones, which add the fixed table ``pos_embed``. diffusers cuts qkv in three and puts
scale before shift in the final layer and in the context of the last block. Both attend to the padding of texts, so a
model that comes from them has ``text.mask: false``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megadit.config.schema.model import LARGEST, ModelConfig, TextInput
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.models.conversion import Conversion, DiffusersModel, key_maps
from megadit.models.conversion.diffusers_class import WHERE, Renaming, check_depth, image_size
from megadit.models.layers import CroppedPositions
from megadit.models.repa import without_projector

_OFFICIAL = "an official SD3 checkpoint"
_CLASS = "SD3Transformer2DModel"
_DIFFUSERS = f"a {_CLASS} of diffusers"
_CLASS_DEFAULTS = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
    "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96, "dual_attention_layers": (),
    "qk_norm": None,
}  # fmt: skip
_PIPELINE = "model.diffusion_model."  # prefix of the transformer in a single-file pipeline
_HEAD_DIM = 64  # of all published sizes
_TOKENS = 77 + 256  # of CLIP and T5, joined by the published pipelines; the weights take any number
_REMEDY = "--to safetensors holds this model exactly"
_READOUT = "final_layer.linear.weight"
_TABLE = "pos_embed.pos_embed"
_NAMES = Renaming(
    ends={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    block={
        "x_block.adaLN_modulation.1": "norm1.linear",
        "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn.ln_q": "attn.norm_q",
        "x_block.attn.ln_k": "attn.norm_k",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.attn.ln_q": "attn.norm_added_q",
        "context_block.attn.ln_k": "attn.norm_added_k",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    },
    blocks="joint_blocks.",
)


def from_official(state: Mapping[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of an SD3 checkpoint, the transformer alone or a whole single-file pipeline.

    Hints: ``heads`` (default width / 64) and ``input_size`` (needed where ``pos_embed`` is not stored).

    Raises:
        UserError: names, shapes, types or the position table are not those of SD3, or a hint is needed or wrong.
    """
    transformer = {n.removeprefix(_PIPELINE): value for n, value in state.items() if n.startswith(_PIPELINE)}
    state = transformer or dict(state)
    second = [name for name in state if ".attn2." in name]
    if second:
        raise UserError(
            f"IN: has a second attention in its image blocks ({key_maps.listed(second)}), as Stable Diffusion 3.5 "
            "Medium; this model has none, so it cannot be read"
        )
    width, channels, patch, _ = key_maps.required(state, "x_embedder.proj.weight", _OFFICIAL, 4).shape
    hidden = len(key_maps.required(state, "joint_blocks.0.x_block.mlp.fc1.weight", _OFFICIAL, 2))
    pooled = key_maps.optional(state, "y_embedder.mlp.0.weight", _OFFICIAL, 2)
    heads = key_maps.checked_heads(width, int(hints.get("heads", width // _HEAD_DIM)) or 1)
    table = key_maps.optional(state, "pos_embed", _OFFICIAL, 3)
    state.pop("pos_embed", None)
    config = ModelConfig(
        family="mmdit",
        width=width,
        depth=key_maps.count_blocks(state, "joint_blocks."),
        heads=heads,
        patch_size=patch,
        in_channels=channels,
        input_size=_input_size(table, patch, hints.get("input_size")),
        pos_embed_max_size=None if table is None else math.isqrt(table.shape[1]),
        learn_sigma=len(key_maps.required(state, _READOUT, _OFFICIAL, 2)) == 2 * channels * patch**2,
        mlp_ratio=hidden / width,
        qk_norm="rms" if "joint_blocks.0.x_block.attn.ln_q.weight" in state else "none",
        qkv_bias="joint_blocks.0.x_block.attn.qkv.bias" in state,
        num_classes=0,
        text={  # type: ignore[arg-type]
            "dim": key_maps.required(state, "context_embedder.weight", _OFFICIAL, 2).shape[1],
            "max_length": _TOKENS,
            "pooled_dim": 0 if pooled is None else pooled.shape[-1],
            "mask": False,
        },
    )
    if table is not None:
        key_maps.check_positions(table, _positions(config), "pos_embed")
    shapes = key_maps.model_shapes(config)
    key_maps.check_state_dict(state, shapes, _OFFICIAL)
    return config, {name: state[name] for name in shapes}


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the authors' class, ``pos_embed`` included; the readout's multiplier is folded.

    Raises:
        UserError: the class has no place for something of this model.
    """
    _refuse_activation(config, "the official SD3")
    return {"pos_embed": _positions(config).to(state[_READOUT]), **_exported(config, state)}


def to_diffusers(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of an SD3Transformer2DModel; biases of qkv that this model lacks are zero there.

    Raises:
        UserError: the class has no place for something of this model.
    """
    target = f"diffusers' {_CLASS}"
    _refuse_activation(config, target)
    if config.mlp_ratio != 4.0:
        raise UserError(f"model.mlp_ratio: {config.mlp_ratio:g}, but {target} has 4 alone; {_REMEDY}")
    assert config.text is not None
    if not config.text.pooled_dim:
        raise UserError(f"model.text.pooled_dim: 0, but {target} always takes a pooled text feature; {_REMEDY}")
    state = _swapped(_exported(config, state), config.depth)
    renamed = _NAMES.to_diffusers(state)
    if not config.qkv_bias:
        qkv = [target for name in state if name.endswith("attn.qkv.weight") for target in _NAMES.target_names(name)]
        renamed |= {f"{name.removesuffix('weight')}bias": renamed[name].new_zeros(len(renamed[name])) for name in qkv}
    if config.pos_embed_max_size is not None:
        renamed[_TABLE] = _positions(config).to(state[_READOUT])
    return _to_json(config), renamed


def from_diffusers(
    config_json: Mapping[str, Any], state: Mapping[str, Tensor], *, where: str = WHERE
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of an SD3Transformer2DModel (Stable Diffusion 3 Medium, 3.5 Large).

    ``where`` names the config in messages.

    Raises:
        UserError: names, shapes or the position table differ from what the config says, or the config asks for
            something that this model does not have.
    """
    fields = Fields({**_CLASS_DEFAULTS, **config_json}, where)
    check_depth(fields, key_maps.count_blocks(state, "transformer_blocks."))
    config = _from_json(fields)
    state = dict(state)
    _check_table(state.pop(_TABLE, None), config, where)
    shapes = key_maps.model_shapes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rows, *columns) in shapes.items():
        targets = _NAMES.target_names(name)
        expected |= {target: (rows // len(targets), *columns) for target in targets}
    key_maps.check_state_dict(state, expected, _DIFFUSERS)
    return config, _swapped(_NAMES.from_diffusers(shapes, state), config.depth)


def _check_table(table: Tensor | None, config: ModelConfig, where: str) -> None:
    """Raise UserError unless the stored position table is that of the config; sizes are checked before it is made."""
    side = config.pos_embed_max_size or config.input_size // config.patch_size
    if table is None:
        if config.pos_embed_max_size is not None:
            raise UserError(
                f"{where} has pos_embed_max_size {side}, but the weights beside it have no {_TABLE}; copy "
                "the whole folder again"
            )
        return
    if tuple(table.shape) != (1, side**2, config.width):
        raise UserError(
            f"{where} asks for positions of {side} x {side} tokens (pos_embed_max_size, or sample_size over "
            f"patch_size) and width {config.width}, but {_TABLE} has shape {list(table.shape)}; give the config of "
            "these weights"
        )
    key_maps.check_positions(table, _positions(config), _TABLE)


def _refuse_activation(config: ModelConfig, target: str) -> None:
    if config.mlp != "gelu_tanh":
        raise UserError(f"model.mlp: {config.mlp}, but {target} has gelu_tanh alone; {_REMEDY}")


def _exported(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without REPA's projector, the readout's multiplier folded in."""
    return {**without_projector(state), _READOUT: key_maps.fold_readout(config, state[_READOUT])}


def _swapped(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Shift and scale swapped in the modulations where diffusers has scale before shift."""
    ends = ("final_layer.adaLN_modulation.1.", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1.")
    return {name: torch.cat(value.chunk(2)[::-1]) if name.startswith(ends) else value for name, value in state.items()}


def _positions(config: ModelConfig) -> Tensor:
    """The stored table, float32 (1, side^2, width)."""
    base = config.input_size // config.patch_size
    positions = CroppedPositions(config.width, base, config.pos_embed_max_size)
    positions.reset_buffers()
    return positions.table.flatten(0, 1)[None]


def _input_size(table: Tensor | None, patch: int, hint: Any) -> int:
    """Side of the image: the hint, or from the stored table, whose coordinates are stretched to span the image's.

    The table's second token is at column base / side, and its first channel is the sine of that.
    """
    if hint is not None:
        return int(hint)
    if table is None:
        raise key_maps.size_required("the file has no pos_embed that would tell")
    side = math.isqrt(table.shape[1])
    if side < 2:
        raise key_maps.size_required(f"pos_embed of shape {list(table.shape)} does not tell")
    sine = min(1.0, max(0.0, float(table[0, 1, 0])))
    return max(1, round(side * math.asin(sine))) * patch


def _to_json(config: ModelConfig) -> dict[str, Any]:
    assert config.text is not None
    return {
        "_class_name": _CLASS,
        "attention_head_dim": config.head_channels,
        "caption_projection_dim": config.width,
        "dual_attention_layers": [],
        "in_channels": config.in_channels,
        "joint_attention_dim": config.text.dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.text.pooled_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
        "sample_size": config.input_size,
    }


def _from_json(fields: Fields) -> ModelConfig:
    """The config of a config.json. Raises UserError for what an MMDiT here does not have."""
    dual = fields.items("dual_attention_layers", null=True)
    if dual:
        raise UserError(
            f"{fields.where} has dual_attention_layers {shown(dual)}, as Stable Diffusion 3.5 Medium; this model has "
            "no second attention, so it cannot be read"
        )
    norm = fields.text("qk_norm", None, null=True)
    if norm not in (None, "rms_norm"):
        raise UserError(f"{fields.where} has qk_norm {shown(norm)}, known are null and rms_norm; it cannot be read")
    channels, patch, heads = (
        fields.integer(key, least=1, most=LARGEST) for key in ("in_channels", "patch_size", "num_attention_heads")
    )
    width = heads * fields.integer("attention_head_dim", least=1, most=LARGEST)
    caption = fields.integer("caption_projection_dim", least=1)
    if caption != width:
        raise UserError(
            f"{fields.where} has caption_projection_dim {caption}, but num_attention_heads x attention_head_dim is "
            f"{width}; in an MMDiT the two are the same"
        )
    out = fields.integer("out_channels", None, least=1, null=True)
    return ModelConfig(
        family="mmdit",
        width=width,
        depth=fields.integer("num_layers", least=1),
        heads=heads,
        patch_size=patch,
        in_channels=channels,
        input_size=image_size(fields, patch),
        pos_embed_max_size=fields.integer("pos_embed_max_size", None, least=1, most=LARGEST, null=True),
        learn_sigma=key_maps.learns_sigma(out or channels, channels, "an MMDiT"),
        qk_norm="none" if norm is None else "rms",
        num_classes=0,
        text=TextInput(
            dim=fields.integer("joint_attention_dim", least=1, most=LARGEST),
            max_length=_TOKENS,
            pooled_dim=fields.integer("pooled_projection_dim", least=1, most=LARGEST),
            mask=False,
        ),
    )


def _comparable_keys(config: ModelConfig, keys: dict[str, Any]) -> dict[str, Any]:
    text = {**keys["text"], "max_length": None}  # texts may have any length
    return {
        **keys,
        "text": text,
        "pos_embed_max_size": config.pos_embed_max_size or config.input_size // config.patch_size,
    }


CONVERSION = Conversion(
    from_official,
    to_official,
    anchor="x_embedder.proj.weight",
    name_prefix="joint_blocks.",
    defaults=lambda model: {"objective": {"kind": "flow"}, "sample": {"guidance": 5.0}},
    hints=("heads", "input_size"),
    notes=(
        "texts are cut or padded to model.text.max_length; their padding is seen, as in SD3, but holds zeros where a "
        "text encoder here makes it (model.text.mask=true leaves it out)",
    ),
    comparable_keys=_comparable_keys,
    diffusers=DiffusersModel(
        _CLASS,
        _CLASS_DEFAULTS,
        to_diffusers,
        from_diffusers,
        lambda t, cond: {"timestep": t, "encoder_hidden_states": cond.text, "pooled_projections": cond.pooled},
        pipeline="StableDiffusion3Pipeline",
        components={
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        },
        supports_flow=True,
        attends_to_padding=True,
    ),
)
