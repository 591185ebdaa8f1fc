"""The stages, masks, null caption, dtypes, published sizes and errors of PixArt; copies and empty copies of it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.weights import randomize
from megadit.conditioning import Conditioning, null_caption
from megadit.config import ModelConfig, preset
from megadit.models import build_model, count_parameters
from megadit.mup import param_specs
from megadit.mup.init import init_parameters


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pixart-xl-2", 610_856_096),
        ("pixart-xl-2-mup", 610_856_096),
        ("pixart-proxy", 39_246_656),
        ("pixart-proxy-mup", 39_246_656),
    ],
)
def test_published_sizes_count_neither_positions_nor_null_caption(name: str, count: int) -> None:
    config = preset(name)
    assert count_parameters(config) == count_parameters(config, fixed=False) == count
    assert (config.head_channels, config.text.dim, config.text.max_length) == (72, 4096, 120)  # type: ignore[union-attr]


@pytest.mark.parametrize("masked", [True, False])
def test_stages_fold_to_forward_and_name_every_parameter(masked: bool) -> None:
    config = tiny_pixart()
    model = build_model(config)
    randomize(model)
    x, t, cond = pixart_inputs(config, masked=masked)
    stage_io = model.packed_inputs(x, t, cond)
    for stage in model.stages():
        kinds = [tensor.is_floating_point() for tensor in stage_io]
        assert kinds == sorted(kinds, reverse=True)  # floats first
        stage_io = stage(stage_io)
    assert torch.equal(stage_io[0], model(x, t, cond))

    named = [(stage.prefix + name, p) for stage in model.stages() for name, p in stage.named_parameters()]
    parameters = dict(model.named_parameters())
    assert sorted(name for name, _ in named) == sorted(parameters)
    assert all(parameters[name] is param for name, param in named)


def test_every_carried_float_reaches_the_output() -> None:
    """A pipeline sends gradients back between stages, so nothing may travel that a later stage does not use."""
    config = tiny_pixart()
    model = build_model(config)
    randomize(model)
    stages = model.stages()
    stage_io = model.packed_inputs(*pixart_inputs(config))
    for index, stage in enumerate(stages):
        stage_io = tuple(v.detach().requires_grad_() if v.is_floating_point() else v for v in stage(stage_io))
        remaining_io = stage_io
        for later in stages[index + 1 :]:
            remaining_io = later(remaining_io)
        if index < len(stages) - 1:
            remaining_io[0].square().mean().backward()
            assert all(v.grad is not None and v.grad.any() for v in stage_io if v.is_floating_point()), index


def test_padding_does_not_change_the_result() -> None:
    config = tiny_pixart()
    model = build_model(config)
    randomize(model, 0.3)
    x, t, cond = pixart_inputs(config)
    assert cond.text is not None and cond.text_mask is not None
    junk = torch.where(cond.text_mask[..., None], cond.text, 1e3)
    out = model(x, t, cond)
    assert torch.equal(out, model(x, t, dataclasses.replace(cond, text=junk)))
    assert not torch.allclose(out, model(x, t, Conditioning(text=cond.text)))  # what was masked does matter

    wider = build_model(tiny_pixart(text={"dim": 20, "max_length": 11}))
    wider.load_state_dict({k: v for k, v in model.state_dict().items() if "y_embedding" not in k}, strict=False)
    longer = Conditioning(
        text=torch.cat([junk, torch.ones(3, 4, 20)], dim=1),
        text_mask=torch.cat([cond.text_mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1),
    )
    torch.testing.assert_close(wider(x, t, longer), out, rtol=0, atol=1e-5)


def test_taps_are_tokens_after_block_k() -> None:
    config = tiny_pixart()
    model = build_model(config)
    randomize(model)
    x, t, cond = pixart_inputs(config)
    out, (second, first) = model(x, t, cond, taps=(2, 1))
    assert torch.equal(out, model(x, t, cond))
    embed, block, *_ = model.stages()
    assert torch.equal(first, block(embed(model.packed_inputs(x, t, cond)))[0])
    assert second.shape == (3, 16, 48) and not torch.equal(second, first)


def test_text_that_is_missing_or_of_another_shape_is_named() -> None:
    config = tiny_pixart()
    model = build_model(config)
    x, t, cond = pixart_inputs(config)
    assert cond.text is not None and cond.text_mask is not None
    with pytest.raises(ValueError, match=r"cond\.text: this model is conditioned on text"):
        model(x, t, Conditioning(labels=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"cond\.text: \(3, 14, 20\) is not \(B, L, 20\) with at most 7 tokens"):
        model(x, t, Conditioning(text=cond.text.repeat(1, 2, 1)))
    with pytest.raises(ValueError, match=r"cond\.text: \(3, 7, 19\)"):
        model(x, t, Conditioning(text=cond.text[..., :19]))
    with pytest.raises(ValueError, match=r"cond\.text_mask: \(3, 6\) is not \(3, 7\)"):
        model(x, t, dataclasses.replace(cond, text_mask=cond.text_mask[:, :6]))
    with pytest.raises(ValueError, match="not an image of 8 x 8"):
        model(x[..., :4], t, cond)


def test_a_shorter_text_needs_no_padding() -> None:
    config = tiny_pixart()
    model = build_model(config).double()
    randomize(model, 0.1)
    x, t, cond = pixart_inputs(config)
    assert cond.text is not None and cond.text_mask is not None
    short = Conditioning(text=cond.text[:, :5], text_mask=cond.text_mask[:, :5])
    hidden = dataclasses.replace(cond, text_mask=cond.text_mask & (torch.arange(7) < 5))
    torch.testing.assert_close(model(x, t, short), model(x, t, hidden), rtol=0, atol=1e-12)


def test_null_caption_is_a_buffer_that_is_saved_and_not_trained() -> None:
    config = tiny_pixart()
    model = build_model(config, seed=3)
    name = "y_embedder.y_embedding"
    assert set(model.state_dict()) == {*dict(model.named_parameters()), name}
    assert name not in dict(model.named_parameters()) and name not in param_specs(model)
    saved = model.state_dict()[name]
    assert torch.equal(saved, null_caption(7, 20)) and torch.equal(saved, build_model(config).state_dict()[name])
    assert float(null_caption(120, 256).std()) == pytest.approx(1 / 16, rel=0.02)


def test_deepcopy_and_to_empty_keep_specs_and_rebuild() -> None:
    config = tiny_pixart(parametrization="mup", base_width=24)
    model = build_model(config, seed=3)
    randomize(model)
    x, t, cond = pixart_inputs(config)
    before = model(x, t, cond)
    twin = copy.deepcopy(model)
    randomize(twin, 0.2)
    assert param_specs(twin) == param_specs(model)
    assert torch.equal(model(x, t, cond), before) and not torch.equal(twin(x, t, cond), before)

    hollow = build_model(config, device="meta").to_empty(device="cpu")
    init_parameters(hollow, 3)
    built = build_model(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(hollow.parameters(), built.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(hollow.buffers(), built.buffers(), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_its_float32_parts(autocast: bool) -> None:
    options = {"qk_norm": "rms"}
    plain = build_model(tiny_pixart(**options))
    exact = build_model(tiny_pixart(**options, attention_precision="fp32", norm_precision="fp32"))
    for model in (plain, exact):
        randomize(model)
    x, t, cond = pixart_inputs(plain.config)
    expected = plain(x, t, cond).detach()
    assert torch.equal(exact(x, t, cond), expected)
    for model in (plain, exact):
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x, t, cond)
        else:
            out = model.bfloat16()(x, t, cond)
            out.float().square().mean().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected.double()).norm() < 0.02 * expected.double().norm()


def test_starts_as_the_original() -> None:
    """Zero readout and zero text entry; modulation is not zero, so that blocks do act (PixArt.py, initialize)."""
    config = tiny_pixart(width=1152, heads=16, depth=1)
    specs = param_specs(build_model(config, device="meta"))
    table = specs["blocks.0.scale_shift_table"]
    assert (table.init_dist, table.init_std) == ("normal", pytest.approx(1152**-0.5))
    normal = ("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
    assert all((specs[f"{n}.weight"].init_dist, specs[f"{n}.weight"].init_std) == ("normal", 0.02) for n in normal)
    for name in ("cross_attn.q_linear", "cross_attn.kv_linear", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        spec = specs[f"blocks.0.{name}.weight"]
        assert spec.init_dist == "uniform" and spec.init_std == pytest.approx((2 / sum(spec.shape)) ** 0.5)
    for name in ("blocks.0.cross_attn.proj.weight", "final_layer.linear.weight", "blocks.0.cross_attn.proj.bias"):
        assert (specs[name].init_std, specs[name].init_value) == (0.0, 0.0)

    small: ModelConfig = tiny_pixart()
    out, (tokens,) = build_model(small)(*pixart_inputs(small), taps=(1,))
    model = build_model(small)
    assert torch.count_nonzero(out) == 0
    assert not torch.equal(tokens, model.pos_embed(model.x_embedder(pixart_inputs(small)[0])))
