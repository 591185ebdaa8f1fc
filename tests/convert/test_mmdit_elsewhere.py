"""MMDiT against diffusers' SD3Transformer2DModel through the conversion: outputs, every gradient, round trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.errors import UserError
from megadit.models import StagedModel, build_model
from megadit.models.mmdit import convert as mmdit

diffusers = pytest.importorskip("diffusers")

# Options of the model and size of the latent that goes in.
CASES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"pos_embed_max_size": 12}, (8, 8)),
    ({"pos_embed_max_size": 12, "qk_norm": "rms", "learn_sigma": True}, (8, 6)),
    ({"qkv_bias": False, "qk_norm": "rms"}, (4, 10)),
]


def tiny(**options: Any) -> ModelConfig:
    return tiny_mmdit(pooled=12, width=72, **options)


def random_state(config: ModelConfig) -> tuple[StagedModel, dict[str, Tensor]]:
    model = build_model(config)
    randomize(model, 0.1)
    return model, {name: value.detach().clone() for name, value in model.state_dict().items()}


def their_model(config_json: dict[str, Any], state: dict[str, Tensor]) -> Any:
    keys = {key: value for key, value in config_json.items() if not key.startswith("_")}
    theirs = diffusers.SD3Transformer2DModel(**keys).eval()
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(("options", "size"), CASES, ids=str)
def test_outputs_and_all_gradients_equal_diffusers(options: dict[str, Any], size: tuple[int, int]) -> None:
    config = tiny(**options)
    ours, state = random_state(config)
    theirs = their_model(*mmdit.to_diffusers(config, state))
    x, t, cond = mmdit_inputs(config, size=size)
    out = ours(x, t, cond)
    expected = theirs(x, encoder_hidden_states=cond.text, pooled_projections=cond.pooled, timestep=t).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)

    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    if config.pos_embed_max_size is not None:
        gradients["pos_embed.pos_embed"] = theirs.pos_embed.pos_embed
    _, expected_grads = mmdit.from_diffusers(dict(theirs.config), gradients)  # linear in the values: so are gradients
    for name, param in ours.named_parameters():
        assert param.grad is not None, name
        torch.testing.assert_close(param.grad, expected_grads[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)
        if not name.endswith("attn.qkv.bias"):  # a third of it, the key part, has a zero gradient
            torch.testing.assert_close(param.grad.norm(), expected_grads[name].norm(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("options", [{"pos_embed_max_size": 12}, {"qk_norm": "rms", "learn_sigma": True}], ids=str)
def test_there_and_back_through_diffusers(options: dict[str, Any]) -> None:
    config = tiny(**options)
    _, state = random_state(config)
    back, weights = mmdit.from_diffusers(*mmdit.to_diffusers(config, state))
    assert back == config.model_copy(update={"text": back.text}) and back.text is not None
    assert (back.text.dim, back.text.pooled_dim, back.text.max_length, back.text.mask) == (20, 12, 333, False)
    assert list(weights) == list(state) and all(torch.equal(weights[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "options", [{"pos_embed_max_size": 6}, {"qk_norm": "rms", "qkv_bias": False, "mlp_ratio": 2.0}], ids=str
)
def test_there_and_back_through_the_authors_format(options: dict[str, Any], prefix: str) -> None:
    config = tiny(**options)
    _, state = random_state(config)
    official = {prefix + name: value for name, value in mmdit.to_official(config, state).items()}
    if prefix:
        official["first_stage_model.conv.weight"] = torch.zeros(1)
    assert prefix + "joint_blocks.1.context_block.adaLN_modulation.1.weight" in official
    back, weights = mmdit.from_official(official, heads=2)
    side = config.pos_embed_max_size or 4  # the stored table tells its side, and that it spans the input of 8 x 8
    assert back == config.model_copy(update={"text": back.text, "pos_embed_max_size": side})
    assert all(torch.equal(weights[name], state[name]) for name in state)
    table = official[prefix + "pos_embed"]
    half = {name: value.half() for name, value in official.items()}
    assert table.shape == (1, side**2, 72) and mmdit.from_official(half, heads=2)[0] == back


def test_the_readout_multiplier_is_folded_and_the_projector_left_out() -> None:
    config = tiny_mmdit(pooled=12, width=64, heads=4, parametrization="mup", base_width=32, output_mult=1.5)
    ours, state = random_state(config)
    x, t, cond = mmdit_inputs(config)
    exported = mmdit.to_diffusers(config, {**state, "repa.0.weight": torch.zeros(3, 64)})
    plain, weights = mmdit.from_diffusers(*exported)
    assert plain.parametrization == "sp"
    other = build_model(plain)
    other.load_state_dict(weights)
    torch.testing.assert_close(other(x, t, cond), ours(x, t, cond), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp": "swiglu"}, r"^model\.mlp: swiglu, .* --to safetensors holds this model exactly$"),
        ({"text": {"dim": 20}}, r"^model\.text\.pooled_dim: 0, .* --to safetensors holds this model exactly$"),
        ({"mlp_ratio": 3.0}, r"^model\.mlp_ratio: 3, "),
    ],
)
def test_what_diffusers_cannot_represent_is_refused(changes: dict[str, Any], words: str) -> None:
    config = ModelConfig(**{**tiny().model_dump(), **changes})
    with pytest.raises(UserError, match=words):
        mmdit.to_diffusers(config, build_model(config).state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dual_attention_layers": [0, 1]}, r"dual_attention_layers \[0, 1\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
        ({"caption_projection_dim": 40}, "caption_projection_dim 40"),
        ({"out_channels": 5}, "puts out 5 channels"),
        ({"num_layers": 4}, "num_layers 4, but the weights beside it have 3 blocks"),
        ({"sample_size": 16}, "pos_embed.pos_embed of shape"),
    ],
)
def test_what_this_model_has_not_is_refused(changes: dict[str, Any], words: str) -> None:
    config = tiny(pos_embed_max_size=12)
    config_json, state = mmdit.to_diffusers(config, build_model(config).state_dict())
    with pytest.raises(UserError, match=words):
        mmdit.from_diffusers({**config_json, **changes}, state)


def test_a_second_attention_and_a_missing_table_are_named() -> None:
    config = tiny()
    official = mmdit.to_official(config, build_model(config).state_dict())
    with pytest.raises(UserError, match=r"joint_blocks\.0\.x_block\.attn2\.qkv\.weight"):
        mmdit.from_official({**official, "joint_blocks.0.x_block.attn2.qkv.weight": torch.zeros(1)})
    del official["pos_embed"]
    with pytest.raises(UserError, match="--hint input_size: is needed"):
        mmdit.from_official(official)
    assert mmdit.from_official(official, heads=2, input_size=8)[0].input_size == 8
    with pytest.raises(UserError, match="--hint heads: 5 does not divide"):
        mmdit.from_official(official, heads=5, input_size=8)


@pytest.mark.parametrize(
    ("name", "dims"), [("pos_embed", 3), ("y_embedder.mlp.0.weight", 2), ("context_embedder.weight", 2)]
)
@pytest.mark.parametrize("hints", [{}, {"input_size": 8}], ids=str)
def test_a_tensor_of_other_dimensions_is_named(name: str, dims: int, hints: dict[str, Any]) -> None:
    config = tiny()
    official = mmdit.to_official(config, build_model(config).state_dict())
    with pytest.raises(UserError, match=rf"SD3.*: {name} has shape \[\], {dims} dimensions are known"):
        mmdit.from_official({**official, name: torch.tensor(1.0)}, heads=2, **hints)
