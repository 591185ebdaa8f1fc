"""Stages, stage states, masks, taps and errors of U-ViT; its published sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.models.tiny_uvit import KINDS, tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig, preset
from megadit.models import build_model, count_parameters
from megadit.mup import param_specs
from megadit.mup.init import init_parameters

_CIFAR = {"in_channels": 3, "num_classes": 0}
_COCO = {"num_classes": 0, "text": {"dim": 768, "max_length": 77}}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("uvit-s", _CIFAR, 44_255_328),
        ("uvit-l", {}, 286_763_172),
        ("uvit-h", {}, 500_832_016),
        ("uvit-s", _COCO, 44_692_644),
    ],
    ids=["cifar-s-2", "imagenet-l-2", "imagenet-h-2", "coco-s-2"],
)
def test_published_counts(name: str, changes: dict[str, Any], count: int) -> None:
    for full_name in (name, f"{name}-mup"):
        config = preset(full_name)
        assert count_parameters(ModelConfig(**(config.model_dump() | changes))) == count


@pytest.mark.parametrize("kind", KINDS)
def test_stages_fold_to_forward_and_name_every_parameter(kind: str) -> None:
    config = tiny_uvit(kind, depth=6)
    model = build_model(config)
    randomize(model)
    x, t, cond = uvit_inputs(config)
    stage_io = model.packed_inputs(x, t, cond)
    skips, shapes = [], []
    for stage in model.stages():
        kinds = [tensor.is_floating_point() for tensor in stage_io]
        assert kinds == sorted(kinds, reverse=True)  # floats first
        assert len({id(tensor) for tensor in stage_io}) == len(stage_io)  # nothing is sent twice
        stage_io = stage(stage_io)
        if stage.is_block:
            skips.append(sum(tensor.is_floating_point() for tensor in stage_io) - 1)
            shapes.append({tuple(tensor.shape) for tensor in stage_io if tensor.is_floating_point()})
    assert torch.equal(stage_io[0], model(x, t, cond))
    assert skips == [0, 1, 2, 3, 2, 1, 0]
    assert all(shape == {(3, model.extra_tokens + 16, 48)} for shape in shapes)

    named = [(stage.prefix + name, p) for stage in model.stages() for name, p in stage.named_parameters()]
    parameters = dict(model.named_parameters())
    assert sorted(name for name, _ in named) == sorted(parameters)
    assert all(parameters[name] is param for name, param in named)


def test_names_are_the_official_ones() -> None:
    names = set(build_model(tiny_uvit("text", mlp_time_embed=True), device="meta").state_dict())
    assert {
        "patch_embed.proj.weight", "time_embed.0.weight", "time_embed.2.bias", "context_embed.weight",
        "pos_embed.weight", "in_blocks.1.norm1.bias", "in_blocks.0.attn.qkv.weight", "mid_block.attn.proj.bias",
        "mid_block.mlp.fc1.weight", "out_blocks.1.skip_linear.weight", "out_blocks.0.mlp.fc2.bias", "norm.weight",
        "decoder_pred.weight", "final_layer.bias",
    } <= names  # fmt: skip
    assert "in_blocks.0.attn.qkv.bias" not in names and "mid_block.skip_linear.weight" not in names
    assert "label_emb.weight" in build_model(tiny_uvit("class"), device="meta").state_dict()


def test_padding_does_not_change_the_result() -> None:
    config = tiny_uvit("text")
    model = build_model(config)
    randomize(model)
    x, t, cond = uvit_inputs(config)
    text = cond.text
    assert text is not None
    short = model(x, t, Conditioning(text=text[:, :2]))
    noise = torch.cat([text[:, :2], 100 * text[:, 2:]], dim=1)
    mask = (torch.arange(6) < 2).expand(3, -1)
    assert torch.equal(short, model(x, t, Conditioning(text=noise, text_mask=mask)))
    assert not torch.equal(short, model(x, t, Conditioning(text=noise)))
    everything = model(x, t, Conditioning(text=text, text_mask=torch.ones(3, 6, dtype=torch.bool)))
    torch.testing.assert_close(everything, model(x, t, Conditioning(text=text)), rtol=0, atol=1e-6)


def test_taps_count_the_middle_block_and_image_tokens_leave_the_rest_out() -> None:
    config = tiny_uvit("text")
    model = build_model(config)
    randomize(model)
    x, t, cond = uvit_inputs(config)
    out, (last, third) = model(x, t, cond, taps=(5, 3))
    assert torch.equal(out, model(x, t, cond)) and not torch.equal(last, third)
    assert last.shape == third.shape == (3, 1 + 6 + 16, 48)
    assert torch.equal(model.image_tokens(last), last[:, 7:])
    with pytest.raises(ValueError, match="blocks 1 to 5"):
        model(x, t, cond, taps=(6,))


def test_what_does_not_fit_is_named() -> None:
    x, t, cond = uvit_inputs(tiny_uvit())
    with pytest.raises(ValueError, match=r"cond\.labels"):
        build_model(tiny_uvit())(x, t, Conditioning())
    with pytest.raises(ValueError, match="input_size"):
        build_model(tiny_uvit())(x[..., :4], t, cond)
    model = build_model(tiny_uvit("text"))
    for text, words in [(None, "give features"), ((3, 7, 20), "at most 6 tokens"), ((3, 6, 19), r"\(B, L, 20\)")]:
        with pytest.raises(ValueError, match=words):
            model(x, t, Conditioning(text=None if text is None else torch.zeros(text)))
    with pytest.raises(ValueError, match=r"cond\.text_mask"):
        model(x, t, Conditioning(text=torch.zeros(3, 6, 20), text_mask=torch.ones(3, 5, dtype=torch.bool)))


def test_padding_may_be_seen() -> None:
    config = tiny_uvit("text")
    model = build_model(config)
    randomize(model)
    x, t, cond = uvit_inputs(config)
    assert cond.text is not None and config.text is not None
    seeing = build_model(config.model_copy(update={"text": config.text.model_copy(update={"mask": False})}))
    seeing.load_state_dict(model.state_dict())
    short = Conditioning(text=cond.text[:, :4])
    padded = model(x, t, Conditioning(text=torch.nn.functional.pad(cond.text[:, :4], (0, 0, 0, 2))))
    assert torch.equal(seeing(x, t, short), padded) and not torch.equal(model(x, t, short), padded)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_empty_copies_and_half_precision(kind: str) -> None:
    config = tiny_uvit(kind, mlp_time_embed=True)
    model = build_model(config, seed=3)
    x, t, cond = uvit_inputs(config)
    twin = copy.deepcopy(model)
    randomize(twin)
    before = model(x, t, cond)
    assert not torch.equal(twin(x, t, cond), before)  # the copy's stages run on the copy's weights
    hollow = build_model(config, device="meta").to_empty(device="cpu")
    assert param_specs(hollow) == param_specs(model)
    init_parameters(hollow, 3)
    assert torch.equal(hollow(x, t, cond), before)
    assert torch.equal(build_model(config, seed=3)(x, t, cond), before)

    expected = twin(x, t, cond)
    half = twin.bfloat16()(x, t, cond)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_gives_the_same_bits(kind: str, how: Any) -> None:
    config = tiny_uvit(kind)
    model = build_model(config)
    randomize(model)
    x, t, cond = uvit_inputs(config)
    gradients = []
    for mode in ("none", how):
        model.recompute = mode
        model.zero_grad()
        model(x, t, cond).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
