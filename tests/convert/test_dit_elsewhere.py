"""DiT in other programs' forms: the official one, the muP repository's, and diffusers' class, there and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.weights import randomize
from megadit.config import ModelConfig, preset
from megadit.convert import family_adapters, from_diffusers, from_official, to_diffusers, to_official
from megadit.convert.diffusers.difference import measure
from megadit.convert.family_adapters import diffusers_gap
from megadit.errors import UserError
from megadit.models import build_model
from megadit.models.conversion.key_maps import infer_heads, model_shapes


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    model = build_model(config)
    randomize(model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def output(config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    model = build_model(config)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(*dit_inputs(config))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [{}, {"learn_sigma": False, "patch_size": 4, "mlp_ratio": 2.0}, {"in_channels": 3, "num_classes": 1, "depth": 1}],
    ids=["usual", "no-variance", "pixels"],
)
def test_official_there_and_back_is_bit_exact(changes: dict[str, Any]) -> None:
    config = tiny_dit(**changes)
    state = random_state(config)
    official = to_official(config, state)
    assert official["pos_embed"].shape == (1, (8 // config.patch_size) ** 2, 48)
    config_back, state_back = from_official("dit", official, heads=2)
    assert config_back == config and same(state_back, state)
    assert to_official(config_back, state_back).keys() == official.keys()


def test_multipliers_are_folded() -> None:
    roles = {"hidden": {"mult": 1.5}, "input": {"mult": 0.5}}
    for changes in ({"output_mult": 3.0}, {"output_mult": 0.7, "role_hps": roles}):
        config = tiny_mup_dit(64, **changes)
        state = random_state(config)
        config_back, state_back = from_official("dit", to_official(config, state), heads=4)
        assert (config_back.parametrization, config_back.output_mult, config_back.role_hps.hidden.mult) == (
            "sp",
            1.0,
            1.0,
        )
        assert not same(state_back, state)
        torch.testing.assert_close(output(config_back, state_back), output(config, state), rtol=0, atol=2e-6)
        config_back, state_back = from_diffusers(*to_diffusers(config, state))
        torch.testing.assert_close(output(config_back, state_back), output(config, state), rtol=0, atol=2e-6)


def test_the_mup_repository_keeps_its_multiplier_in_the_forward_pass() -> None:
    config = tiny_dit(width=144, heads=None, head_dim=72, parametrization="mup", base_width=288, output_mult=4.0)
    state = random_state(config)
    stored = {"pos_embed": to_official(config, state)["pos_embed"], **state}  # MuReadout folds nothing
    config_back, state_back = from_official("dit", stored, parametrization="mup", output_mult=4.0)
    assert config_back == config and same(state_back, state)


def test_published_sizes_need_no_hints() -> None:
    for name in ("dit-s-8", "dit-b-4", "dit-l-2", "dit-xl-2"):
        config = preset(name)
        shapes = {**model_shapes(config), "pos_embed": (1, (config.input_size // config.patch_size) ** 2, config.width)}
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        del state["pos_embed"]  # a table without values cannot be compared
        assert from_official("dit", state, input_size=32)[0] == config


def test_heads_and_size_are_asked_for_where_nothing_tells() -> None:
    state = to_official(tiny_dit(), random_state(tiny_dit()))
    with pytest.raises(UserError, match="--hint heads: is needed.*width of 48"):
        from_official("dit", state)
    with pytest.raises(UserError, match="--hint heads: 5 does not divide the width 48"):
        from_official("dit", state, heads=5)
    with pytest.raises(UserError, match="--hint heads: 2.5 is not a whole number above 0"):
        from_official("dit", state, heads=2.5)
    with pytest.raises(UserError, match="--hint input_size: 16, but pos_embed of IN is for 8"):
        from_official("dit", state, heads=2, input_size=16)
    with pytest.raises(UserError, match="--hint depth: is not known for dit; known are heads, input_size"):
        from_official("dit", state, depth=2)
    with pytest.raises(UserError, match="--hint base_width: 32 has no effect without --hint parametrization=mup"):
        from_official("dit", state, heads=2, base_width=32)
    with pytest.raises(UserError, match="--hint parametrization: mUP is not one of sp, mup"):
        from_official("dit", state, heads=2, parametrization="mUP")
    del state["pos_embed"]
    with pytest.raises(UserError, match="--hint input_size: is needed"):
        from_official("dit", state, heads=2)
    assert from_official("dit", state, heads=2, input_size=16)[0].input_size == 16
    with pytest.raises(UserError, match="cannot be this family's model: patch_size: 2 does not divide input_size 7"):
        from_official("dit", state, heads=2, input_size=7)
    assert infer_heads(144, None, {}, (72, 64)) == infer_heads(128, None, {}, (72, 64)) == 2


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("joint_blocks.0.x_block.attn.qkv.weight", "mmdit"),
        ("y_embedder.y_proj.fc1.weight", "pixart"),
        ("in_blocks.0.attn.qkv.weight", "uvit"),
    ],
)
def test_a_file_of_another_family_is_named(name: str, family: str) -> None:
    with pytest.raises(UserError, match=f"is not an official DiT .*; read it with --from official-{family}"):
        from_official("dit", {name: torch.ones(2, 2)})


def damaged(what: str) -> dict[str, Tensor]:
    state = to_official(tiny_dit(), random_state(tiny_dit()))
    if what == "missing":
        return {name: value for name, value in state.items() if ".mlp.fc2" not in name and "attn.proj" not in name}
    if what == "unexpected":
        return {**state, "blocks.0.attn.q_norm.weight": torch.ones(24)}
    if what == "width":
        return {**state, "blocks.1.attn.proj.weight": torch.ones(64, 48)}
    if what == "integers":
        return {**state, "blocks.1.attn.proj.weight": torch.ones(48, 48, dtype=torch.int8)}
    if what == "positions":
        return {**state, "pos_embed": torch.zeros_like(state["pos_embed"])}
    if what == "scalar":
        return {**state, "pos_embed": torch.tensor(1.0)}
    if what == "channels":
        return {**state, "final_layer.linear.weight": torch.ones(20, 48)}
    return {"layers.0.weight": torch.ones(2), "layers.0.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", r"missing are blocks.0.attn.proj.bias, .* and 3 more; give the whole checkpoint"),
        ("unexpected", "unexpected are blocks.0.attn.q_norm.weight"),
        ("width", r"blocks.1.attn.proj.weight has shape \[64, 48\], the other tensors ask for \[48, 48\]"),
        ("integers", "blocks.1.attn.proj.weight holds int8 and not floating-point weights"),
        ("positions", "pos_embed of shape .* is not the sin-cos table"),
        ("scalar", r"pos_embed has shape \[\], 3 dimensions are known; give another file"),
        ("channels", "puts out 5 channels for an input of 4, and a DiT has as many"),
        ("other", "has no x_embedder.proj.weight; it begins with layers.0.bias, layers.0.weight"),
    ],
)
def test_other_files_are_refused(what: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_official("dit", damaged(what), heads=2)


def test_a_name_that_a_plugins_family_looks_up_unchecked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(state: dict[str, Tensor], **hints: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
        return tiny_dit(depth=len(state["readout.weight"])), state

    careless = dataclasses.replace(family_adapters.conversion_of("dit"), from_official=unchecked)
    monkeypatch.setattr(family_adapters, "conversion_of", lambda family: careless)
    expected = r"^IN: has no readout\.weight; give the whole checkpoint of the model that --from names$"
    with pytest.raises(UserError, match=expected):
        from_official("dit", {"x_embedder.proj.weight": torch.ones(2)})


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "learn_sigma": False}], ids=["usual", "erf"])
def test_diffusers_there_and_back_and_its_one_difference(changes: dict[str, Any], monkeypatch: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = tiny_dit(**changes)
    state = random_state(config)
    config_json, theirs = to_diffusers(config, state)
    gap = diffusers_gap(config_json)
    assert gap is not None and "half - 1" in gap and "norm_eps" not in gap
    assert measure(config, state, config_json, theirs, gap).maximum > 0.05
    config_back, state_back = from_diffusers(config_json, theirs)
    assert config_back == config and same(state_back, state)

    embeddings = diffusers.models.embeddings
    spaced = embeddings.Timesteps

    def by_half(num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float) -> nn.Module:
        return spaced(num_channels, flip_sin_to_cos, 0)

    monkeypatch.setattr(embeddings, "Timesteps", by_half)
    assert measure(config, state, config_json, theirs, None).small  # nothing else differs
    config_json = {**config_json, "norm_eps": 1e-5}
    assert "1e-05 in place of 1e-06" in str(diffusers_gap(config_json))
    assert from_diffusers(config_json, theirs)[0] == config


def test_other_diffusers_models_are_refused() -> None:
    config = tiny_dit()
    config_json, theirs = to_diffusers(config, random_state(config))
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"_class_name": "UNet2DModel"}, {}, "_class_name UNet2DModel; known are DiTTransformer2DModel, PixArt"),
        ({"norm_type": "ada_norm"}, {}, "config.json has norm_type 'ada_norm', a DiT has 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, {}, "activation_fn 'geglu', known are gelu-approximate, gelu"),
        ({"num_layers": 3}, {}, "num_layers 3, but the weights beside it have 2 blocks"),
        ({"num_attention_heads": 4}, {}, r"pos_embed.proj.weight has shape \[48, 4, 2, 2\], the other tensors ask for"),
        (
            {},
            {"transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias": torch.ones(48)},
            r"transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias differs from that of block 0",
        ),
    ]
    for json_changes, changes, words in cases:
        with pytest.raises(UserError, match=words):
            from_diffusers({**config_json, **json_changes}, {**theirs, **changes})


@pytest.mark.parametrize(
    ("changes", "official", "diffusers"),
    [
        ({"qk_norm": "rms"}, "qk_norm: rms", "qk_norm: rms"),
        ({"mlp": "swiglu"}, "mlp: swiglu", "mlp: swiglu"),
        ({"mlp": "gelu"}, "mlp: gelu", None),
        ({"num_classes": 0}, "num_classes: 0", "num_classes: 0"),
        ({"mlp_ratio": 2.0}, None, "mlp_ratio: 2, but"),
    ],
    ids=str,
)
def test_what_others_cannot_represent_is_refused(
    changes: dict[str, Any], official: str | None, diffusers: str | None
) -> None:
    config = tiny_dit(**changes)
    state = random_state(config)
    for function, words in ((to_official, official), (to_diffusers, diffusers)):
        if words is None:
            function(config, state)
        else:
            with pytest.raises(UserError, match=words):
                function(config, state)


def test_unknown_families_and_weights_of_another_config_are_told() -> None:
    with pytest.raises(UserError, match="family: 'sit' is not known; known are dit, pixart, uvit, mmdit"):
        from_official("sit", {})
    with pytest.raises(UserError, match="missing are blocks.2"):
        to_official(tiny_dit(depth=3), random_state(tiny_dit()))
