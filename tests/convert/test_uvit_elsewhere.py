"""Official U-ViT checkpoints in and out: exact round trips, what is inferred, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models.reference_uvit import reference_uvit
from helpers.models.tiny_uvit import KINDS, tiny_mup_uvit, tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from megadit.config import ModelConfig, preset
from megadit.errors import UserError
from megadit.models import StagedModel, build_model
from megadit.models.conversion.key_maps import model_shapes
from megadit.models.uvit import convert as uvit

_SHAPES: list[dict[str, Any]] = [
    {},
    {"mlp_time_embed": True, "qkv_bias": True, "conv": False},
    {"patch_size": 4, "in_channels": 3, "depth": 2, "mlp_ratio": 2.0},
]


def _random(config: ModelConfig) -> tuple[StagedModel, dict[str, Tensor]]:
    model = build_model(config)
    randomize(model, 0.1)
    return model, {name: value.detach().clone() for name, value in model.state_dict().items()}


def _hints(kind: str) -> dict[str, Any]:
    return {"heads": 2, **({"text_max_length": 6} if kind == "text" else {})}


def _seeing_padding(config: ModelConfig) -> ModelConfig:
    """As the original, which has no mask of texts."""
    if config.text is None:
        return config
    return config.model_copy(update={"text": config.text.model_copy(update={"mask": False})})


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, shape: dict[str, Any]) -> None:
    config = tiny_uvit(kind, **shape)
    _, state = _random(config)
    official = uvit.to_official(config, state)
    assert set(official) == {"pos_embed" if name == "pos_embed.weight" else name for name in state}
    back, weights = uvit.from_official(official, **_hints(kind))
    assert back == _seeing_padding(config)
    assert list(weights) == list(state) and all(torch.equal(weights[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("uvit-s", {"in_channels": 3, "num_classes": 0}),
        ("uvit-m", {"input_size": 64, "patch_size": 4, "in_channels": 3}),
        ("uvit-l", {}),
        ("uvit-h", {}),
        ("uvit-s", {"num_classes": 0, "text": {"dim": 768, "max_length": 77}}),
    ],
    ids=["cifar", "imagenet-64", "imagenet-l", "imagenet-h", "coco"],
)
def test_published_sizes_need_no_hints(name: str, changes: dict[str, Any]) -> None:
    config = ModelConfig(**(preset(name).model_dump() | changes))
    shapes = model_shapes(config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state["pos_embed"] = state.pop("pos_embed.weight")
    back, _ = uvit.from_official(state)
    assert back == _seeing_padding(config)


def test_a_mup_model_leaves_with_its_readout_folded() -> None:
    config = tiny_mup_uvit(64, 32, output_mult=3.0)
    model, state = _random(config)
    x, t, cond = uvit_inputs(config)
    back, weights = uvit.from_official(uvit.to_official(config, state), heads=4)
    assert back.parametrization == "sp" and torch.equal(
        weights["decoder_pred.weight"], 1.5 * state["decoder_pred.weight"]
    )
    expected = reference_uvit(back, weights, x, t, cond.labels)
    torch.testing.assert_close(model(x, t, cond), expected, rtol=0, atol=2e-5)


def test_a_model_without_a_null_class_gets_one() -> None:
    config = tiny_uvit("class", num_classes=9)
    _, state = _random(config)
    official = uvit.to_official(config, state)  # 10 rows
    assert uvit.from_official(official, heads=2)[0].num_classes == 9
    for no in (False, "false"):
        back, weights = uvit.from_official(official, heads=2, null_class=no)
        assert back.num_classes == 10 and torch.equal(weights["label_emb.weight"][:10], state["label_emb.weight"])
        assert torch.count_nonzero(weights["label_emb.weight"][10]) == 0
    with pytest.raises(UserError, match="null_class: maybe is neither"):
        uvit.from_official(official, heads=2, null_class="maybe")
    with pytest.raises(UserError, match=r"label_emb\.weight has shape \[\], 2 dimensions are known"):
        uvit.from_official({**official, "label_emb.weight": torch.tensor(1.0)}, heads=2, null_class=False)


def _official(kind: str, **changes: Any) -> dict[str, Tensor]:
    config = tiny_uvit(kind, **changes)
    return uvit.to_official(config, _random(config)[1])


def test_text_length_and_input_size_tell_each_other() -> None:
    state = _official("text")  # 1 + 6 + 16 positions
    for hints in ({"input_size": 8}, {"text_max_length": 6}, {"input_size": 8, "text_max_length": 6}):
        config, _ = uvit.from_official(state, heads=2, **hints)
        assert config.text is not None and (config.input_size, config.text.max_length) == (8, 6)
    for hints in ({}, {"input_size": 12}, {"text_max_length": 7}, {"input_size": 6, "text_max_length": 6}):
        with pytest.raises(UserError, match="pos_embed has 23 positions"):
            uvit.from_official(state, heads=2, **hints)


def test_what_is_not_a_uvit_is_named() -> None:
    state = _official("class")
    with pytest.raises(UserError, match="--hint heads"):
        uvit.from_official(_official("class", width=40))
    with pytest.raises(UserError, match="no patch_embed"):
        uvit.from_official({"x_embedder.proj.weight": torch.zeros(1)})
    cut = {name: value for name, value in state.items() if name != "mid_block.norm1.bias"}
    with pytest.raises(UserError, match=r"missing are mid_block\.norm1\.bias"):
        uvit.from_official(cut, heads=2)
    with pytest.raises(UserError, match="unexpected are surplus"):
        uvit.from_official({**state, "surplus": torch.zeros(1)}, heads=2)
    with pytest.raises(UserError, match="pos_embed has 18 positions.* input_size=16"):
        uvit.from_official(state, heads=2, input_size=16)


@pytest.mark.parametrize("changes", [{"qk_norm": "rms"}, {"mlp": "swiglu"}, {"learn_sigma": True}], ids=str)
def test_what_the_original_lacks_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="official U-ViT cannot represent"):
        _official("none", **changes)
