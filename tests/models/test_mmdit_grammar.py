"""The stages, stage states, padding, sizes, dtypes, recomputation, counts and errors of MMDiT."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.weights import randomize
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig, preset
from megadit.models import build_model, count_parameters

FP32 = {"attention_precision": "fp32", "norm_precision": "fp32"}


@pytest.mark.parametrize(("pooled", "lengths"), [(0, None), (12, [5, 2, 1])])
def test_stages_fold_to_forward_and_name_every_parameter(pooled: int, lengths: list[int] | None) -> None:
    config = tiny_mmdit(pooled=pooled, qk_norm="rms")
    model = build_model(config)
    randomize(model)
    x, t, cond = mmdit_inputs(config, lengths=lengths)
    stage_io = model.packed_inputs(x, t, cond)
    lives = []
    for stage in model.stages():
        kinds = [tensor.is_floating_point() for tensor in stage_io]
        assert kinds == sorted(kinds, reverse=True)  # floats first
        stage_io = stage(stage_io)
        lives.append(len(stage_io))
    assert lives == [5 if lengths else 4] * config.depth + [3, 1]  # the last block drops the context and its mask
    assert torch.equal(stage_io[0], model(x, t, cond))

    named = [(stage.prefix + name, p) for stage in model.stages() for name, p in stage.named_parameters()]
    parameters = dict(model.named_parameters())
    assert sorted(name for name, _ in named) == sorted(parameters)
    assert all(parameters[name] is param for name, param in named)
    assert set(model.state_dict()) == set(parameters)


def test_taps_are_image_tokens() -> None:
    config = tiny_mmdit()
    model = build_model(config)
    randomize(model)
    x, t, cond = mmdit_inputs(config, size=(8, 4))
    out, (third, first) = model(x, t, cond, taps=(3, 1))
    assert torch.equal(out, model(x, t, cond))
    assert third.shape == first.shape == model.image_tokens(first).shape == (3, 8, 48)


def test_padding_changes_nothing() -> None:
    """What stands behind the mask, and how much of it, leaves the picture alone; what stands before does not."""
    config = tiny_mmdit(qk_norm="rms", mlp="swiglu")
    model = build_model(config).double()
    randomize(model, 0.2)
    x, t, cond = mmdit_inputs(config, lengths=[3, 3, 3])
    assert cond.text is not None and cond.text_mask is not None
    out = model(x, t, cond)
    other = cond.text.clone()
    other[:, 3:] = 1e3
    torch.testing.assert_close(model(x, t, replace(cond, text=other)), out, rtol=0, atol=1e-12)
    short = Conditioning(text=cond.text[:, :3])
    torch.testing.assert_close(model(x, t, short), out, rtol=0, atol=1e-12)
    long = Conditioning(text=torch.cat([other, other], 1), text_mask=torch.arange(10).expand(3, 10) < 3)
    torch.testing.assert_close(model(x, t, long), out, rtol=0, atol=1e-12)
    other[:, 2] = 0
    assert not torch.allclose(model(x, t, replace(cond, text=other)), out, atol=1e-3)
    everything = replace(cond, text_mask=torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(model(x, t, everything), model(x, t, Conditioning(text=cond.text)), rtol=0, atol=1e-12)


def test_a_mask_of_numbers_is_a_mask() -> None:
    config = tiny_mmdit()
    model = build_model(config)
    randomize(model)
    x, t, cond = mmdit_inputs(config, lengths=[3, 1, 5])
    assert cond.text_mask is not None
    out = model(x, t, cond)
    assert torch.equal(model(x, t, replace(cond, text_mask=cond.text_mask.float())), out)
    with pytest.raises(ValueError, match=r"cond\.text_mask: \(3, 4\) is not \(3, 5\)"):
        model(x, t, replace(cond, text_mask=cond.text_mask[:, :4]))


def test_text_of_no_tokens_is_a_condition_too() -> None:
    config = tiny_mmdit()
    model = build_model(config)
    randomize(model)
    x, t, cond = mmdit_inputs(config, lengths=[0, 0, 5])
    model(x, t, cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_has_a_gradient_and_only_the_last_context_queries_have_none() -> None:
    config = tiny_mmdit(pooled=12, qk_norm="rms")
    model = build_model(config)
    randomize(model)
    model(*mmdit_inputs(config)).square().mean().backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    last = "joint_blocks.2.context_block.attn."
    queries = gradients[last + "qkv.weight"]
    assert queries is not None and not queries[:48].any() and queries[48:].any()
    none = {name for name, grad in gradients.items() if grad is not None and not grad.any()}
    assert none == {last + "ln_q.weight"} and None not in gradients.values()


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_blocks_give_the_same_bits(how: Any) -> None:
    config = tiny_mmdit(pooled=12, qk_norm="rms", mlp="swiglu")
    model = build_model(config)
    randomize(model)
    x, t, cond = mmdit_inputs(config, lengths=[5, 2, 3])
    model(x, t, cond).square().mean().backward()
    grads = [param.grad for param in model.parameters()]
    model.zero_grad()
    model.recompute = how
    model(x, t, cond).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_dtype_and_float32_its_bits(autocast: bool) -> None:
    options: dict[str, Any] = {"pooled": 12, "qk_norm": "rms", "pos_embed_max_size": 6}
    plain, exact = build_model(tiny_mmdit(**options)), build_model(tiny_mmdit(**options, **FP32))
    for model in (plain, exact):
        randomize(model)
    x, t, cond = mmdit_inputs(plain.config, lengths=[5, 2, 3])
    with torch.no_grad():
        expected = plain(x, t, cond)
        assert torch.equal(exact(x, t, cond), expected)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                output = exact(x, t, cond)
        else:
            output = exact.bfloat16()(x, t, cond)
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize(
    ("options", "size", "change", "words"),
    [
        ({}, (8, 8), {"text": None}, r"cond\.text: .* \(B, L, 20\)"),
        ({}, (8, 8), {"text": torch.zeros(3, 5, 7)}, r"cond\.text: \(3, 5, 7\)"),
        ({"pooled": 12}, (8, 8), {"pooled": None}, r"cond\.pooled: none, .* \(B, 12\)"),
        ({}, (8, 7), {}, "whole patches of 2 x 2"),
        ({"pos_embed_max_size": 4}, (8, 10), {}, r"more than 4 patches \(pos_embed_max_size\)"),
    ],
    ids=["text", "dim", "pooled", "patches", "large"],
)
def test_inputs_that_do_not_fit_are_named(options: Any, size: Any, change: Any, words: str) -> None:
    config = tiny_mmdit(**options)
    x, t, cond = mmdit_inputs(config, size=size)
    with pytest.raises(ValueError, match=words):
        build_model(config)(x, t, replace(cond, **change))


@pytest.mark.parametrize(
    ("name", "billions", "heads"), [("mmdit-proxy", 0.183, 8), ("mmdit-18b", 18.1, 80)], ids=["proxy", "18b"]
)
def test_counts_of_the_papers_sizes(name: str, billions: float, heads: int) -> None:
    """SwiGLU of hidden size 4n, a last context block that is only read, T5 alone; counted without memory."""
    begin = time.perf_counter()
    for parametrization in ("", "-mup"):
        config = preset(name + parametrization)
        assert count_parameters(config) == pytest.approx(billions * 1e9, rel=0.005)
        assert (config.num_heads, config.head_channels, config.depth, config.mlp) == (heads, 64, 16, "swiglu")
        assert config.text is not None and (config.text.dim, config.text.pooled_dim) == (4096, 0)
    assert time.perf_counter() - begin < 10
    gelu = ModelConfig(**{**preset(name).model_dump(), "mlp": "gelu_tanh"})
    assert count_parameters(gelu) < 0.85 * billions * 1e9  # so that the count tells the two apart
