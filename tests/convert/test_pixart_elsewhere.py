"""PixArt to and from its official form and diffusers: exact round trips, folded multipliers, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart, tiny_pixart
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.config.schema.model import RoleHP, RoleHPs
from megadit.errors import UserError
from megadit.models import build_model
from megadit.models.layers import sincos_2d
from megadit.models.pixart.convert import NULL_CAPTION, from_diffusers, from_official, to_diffusers, to_official

_HINTS = {"heads": 2}


def _random(config: ModelConfig) -> tuple[Any, dict[str, Tensor]]:
    model = build_model(config)
    randomize(model)
    model.y_embedder.y_embedding.normal_()
    return model, model.state_dict()


def _output(config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    model = build_model(config)
    model.load_state_dict(state)
    with torch.no_grad():
        out: Tensor = model(*pixart_inputs(config))
    return out


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"pos_scale": 2.0, "patch_size": 4, "mlp_ratio": 2.0}], ids=str)
def test_official_there_and_back(changes: dict[str, Any]) -> None:
    config = tiny_pixart(**changes)
    model, state = _random(config)
    official = to_official(config, state)
    assert official.keys() == state.keys() | {"pos_embed"}
    assert torch.equal(official["pos_embed"], model.pos_embed.table)
    again, weights = from_official(official, **_HINTS)
    assert again == config and _same(weights, state)
    assert _same(to_official(again, weights), official)
    assert torch.equal(_output(again, weights), _output(config, state))


def test_official_without_positions_or_null_caption_takes_hints() -> None:
    config = tiny_pixart(pos_scale=2.0)
    _, state = _random(config)
    bare = {name: value for name, value in state.items() if name != NULL_CAPTION}
    with pytest.raises(UserError, match=r"--hint input_size: is needed"):
        from_official(bare, **_HINTS)
    again, weights = from_official(bare, **_HINTS, input_size=8, pos_scale=2.0, text_max_length=7)
    assert again == config and weights.keys() == state.keys()
    assert torch.equal(weights[NULL_CAPTION], build_model(config).y_embedder.y_embedding)


def test_multipliers_are_folded_on_export() -> None:
    hps = RoleHPs(hidden=RoleHP(mult=1.5, lr=2.0), input=RoleHP(mult=0.5))
    config = tiny_mup_pixart(64, output_mult=3.0, role_hps=hps)
    model, state = _random(config)
    with torch.no_grad():
        expected = model(*pixart_inputs(config))
    for again, weights in (
        from_official(to_official(config, state), heads=4),
        from_diffusers(*to_diffusers(config, state)),
    ):
        assert (again.parametrization, again.output_mult) == ("sp", 1.0)
        torch.testing.assert_close(_output(again, weights), expected, rtol=0, atol=1e-5)


def test_checkpoints_of_the_mup_repository_keep_their_multiplier() -> None:
    config = tiny_mup_pixart(64, output_mult=3.0)
    _, state = _random(config)
    table = sincos_2d(64, 4, 4)[None]
    again, weights = from_official(
        {**state, "pos_embed": table}, heads=4, parametrization="mup", base_width=32, output_mult=3.0
    )
    assert again == config and _same(weights, state)


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "qkv_bias": False, "pos_scale": 0.5}], ids=str)
def test_diffusers_there_and_back(changes: dict[str, Any]) -> None:
    config = tiny_pixart(**changes)
    _, state = _random(config)
    config_json, exported = to_diffusers(config, state)
    again, weights = from_diffusers(config_json, exported)
    assert again == config
    other, _ = from_diffusers(config_json, exported, max_length=9)
    assert other.text is not None and other.text.max_length == 9
    null = weights.pop(NULL_CAPTION)
    assert torch.equal(null, build_model(config).y_embedder.y_embedding)
    assert _same(weights, {name: value for name, value in state.items() if name != NULL_CAPTION})
    json_again, exported_again = to_diffusers(again, weights)
    assert json_again == config_json and _same(exported_again, exported)


def test_defaults_of_the_diffusers_class_stand_for_missing_keys() -> None:
    diffusers = pytest.importorskip("diffusers")
    config_json = {"caption_channels": 20, "sample_size": 64, "num_layers": 1}
    with torch.device("meta"):
        state = diffusers.PixArtTransformer2DModel.from_config(config_json).state_dict()
    config, _ = from_diffusers(config_json, state)
    assert (config.width, config.num_heads, config.out_channels, config.pos_scale) == (1152, 16, 8, 1.0)
    assert config.text is not None and (config.text.dim, config.text.max_length) == (20, 120)


def test_published_width_has_16_heads() -> None:
    config = tiny_pixart(width=1152, heads=16, depth=1)
    state = {
        name: torch.zeros(()).expand(v.shape) for name, v in build_model(config, device="meta").state_dict().items()
    }
    again, _ = from_official(state, input_size=8)
    assert again.num_heads == 16


@pytest.mark.parametrize(
    ("damage", "hints", "words"),
    [
        ({"csize_embedder.mlp.0.weight": torch.zeros(1)}, {}, "PixArt for 1024 pixels"),
        ({"blocks.7.mlp.fc1.weight": torch.zeros(1)}, {}, "missing are blocks"),
        ({"other": torch.zeros(1)}, {}, "unexpected are other"),
        ({"pos_embed": torch.zeros(1, 16, 48)}, {}, "pos_embed is not the sin-cos table"),
        ({"pos_embed": torch.tensor(1.0)}, {}, r"pos_embed has shape \[\], 3 dimensions are known; give another file"),
        ({"blocks.1.mlp.fc2.bias": torch.zeros(49)}, {}, r"blocks\.1\.mlp\.fc2\.bias has shape \[49\]"),
        ({"final_layer.linear.weight": torch.zeros(12, 48)}, {}, "puts out 3 channels for an input of 4"),
        ({}, {"heads": 5}, "heads: 5 does not divide"),
        ({}, {"heads": None}, "heads: is needed, .* a width of 48"),
        ({}, {"input_size": 16}, "input_size: 16, but pos_embed of IN is for 8"),
        ({}, {"pos_scale": 3.0}, "at pos_scale 3"),
    ],
    ids=["micro", "depth", "name", "positions", "scalar", "shape", "channels", "heads", "no-heads", "size", "scale"],
)
def test_other_official_files_are_refused(damage: dict[str, Tensor], hints: dict[str, Any], words: str) -> None:
    config = tiny_pixart()
    official = to_official(config, _random(config)[1])
    with pytest.raises(UserError, match=words):
        from_official({**official, **damage}, **{**_HINTS, **hints})


@pytest.mark.parametrize(
    ("json_changes", "extra", "words"),
    [
        ({"use_additional_conditions": True}, {}, "PixArt for 1024 pixels"),
        ({"use_additional_conditions": None, "sample_size": 128}, {}, "PixArt for 1024 pixels"),
        ({}, {"adaln_single.emb.resolution_embedder.linear_1.weight": torch.zeros(1)}, "PixArt for 1024 pixels"),
        ({"norm_type": "ada_norm_zero"}, {}, "norm_type 'ada_norm_zero'"),
        ({"cross_attention_dim": 40}, {}, "cross_attention_dim 40"),
        ({"caption_channels": None}, {}, "no caption_channels"),
        ({"activation_fn": "geglu"}, {}, "activation_fn 'geglu'"),
        ({"num_layers": 3}, {}, r"num_layers 3, but the weights beside it have 2 blocks"),
    ],
    ids=["flag", "default", "embedder", "norm", "cross", "caption", "activation", "depth"],
)
def test_other_diffusers_models_are_refused(json_changes: dict[str, Any], extra: dict[str, Tensor], words: str) -> None:
    config = tiny_pixart()
    config_json, state = to_diffusers(config, _random(config)[1])
    with pytest.raises(UserError, match=words):
        from_diffusers({**config_json, **json_changes}, {**state, **extra}, max_length=7)


@pytest.mark.parametrize(
    ("changes", "official", "diffusers"),
    [({"qk_norm": "rms"}, True, True), ({"mlp": "swiglu"}, True, True), ({"mlp": "gelu"}, True, False),
     ({"qkv_bias": False}, True, False), ({"mlp_ratio": 2.0}, False, True)],
    ids=str,
)  # fmt: skip
def test_what_others_cannot_represent_is_refused(changes: dict[str, Any], official: bool, diffusers: bool) -> None:
    config = tiny_pixart(**changes)
    state = build_model(config).state_dict()
    for export, refused in ((to_official, official), (to_diffusers, diffusers)):
        if refused:
            with pytest.raises(UserError, match=f"model.{next(iter(changes))}"):
                export(config, state)
        else:
            export(config, state)
