"""The stages, taps, dtypes and errors of DiT; copies and empty copies of it."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.weights import randomize
from megadit.conditioning import Conditioning
from megadit.models import build_model
from megadit.mup import param_specs
from megadit.mup.init import init_parameters


def test_stages_fold_to_forward_and_name_every_parameter() -> None:
    config = tiny_dit()
    model = build_model(config)
    randomize(model)
    x, t, cond = dit_inputs(config)
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


def test_taps_are_tokens_after_block_k_in_the_order_asked() -> None:
    config = tiny_dit(depth=3)
    model = build_model(config)
    randomize(model)
    x, t, cond = dit_inputs(config)
    out, (third, first) = model(x, t, cond, taps=(3, 1))
    assert torch.equal(out, model(x, t, cond))
    embed, block, *_ = model.stages()
    assert torch.equal(first, block(embed(model.packed_inputs(x, t, cond)))[0])
    assert third.shape == first.shape == (3, 16, 48) and not torch.equal(third, first)
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        model(x, t, cond, taps=(0,))


def test_missing_labels_and_wrong_size_are_named() -> None:
    config = tiny_dit()
    model = build_model(config)
    x, t, _ = dit_inputs(config)
    with pytest.raises(ValueError, match=r"cond\.labels"):
        model(x, t, Conditioning())
    with pytest.raises(ValueError, match="input_size"):
        model(x[..., :4], t, Conditioning(labels=torch.zeros(3, dtype=torch.int64)))


def test_half_precision_keeps_neighbouring_timesteps_apart() -> None:
    config = tiny_dit(num_classes=0)
    model = build_model(config)
    randomize(model, 0.2)
    x, _, _ = dit_inputs(config)
    t = torch.tensor([997.0, 998.0, 999.0])  # one bf16 step is 4 here
    exact = model(x[:1].expand(3, -1, -1, -1), t)
    half = model.bfloat16()(x[:1].expand(3, -1, -1, -1), t)
    assert half.dtype == torch.bfloat16 and model.pos_embed.table.dtype == torch.bfloat16
    assert not torch.equal(half[0], half[1]) and not torch.equal(half[1], half[2])
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))


def test_deepcopy_and_to_empty_keep_specs_and_rebuild() -> None:
    config = tiny_dit(parametrization="mup", base_width=24)
    model = build_model(config, seed=3)
    x, t, cond = dit_inputs(config)
    twin = copy.deepcopy(model)
    randomize(twin)
    assert param_specs(twin) == param_specs(model)
    before = model(x, t, cond)
    assert not torch.equal(twin(x, t, cond), before)  # the copy's stages run on the copy's weights

    hollow = build_model(config, device="meta").to_empty(device="cpu")
    assert param_specs(hollow) == param_specs(model)
    init_parameters(hollow, 3)
    assert all(torch.equal(a, b) for a, b in zip(hollow.parameters(), model.parameters(), strict=True))
    assert torch.equal(hollow(x, t, cond), before)


def test_only_weights_are_saved() -> None:
    model = build_model(tiny_dit())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert {"x_embedder.proj.weight", "blocks.1.adaLN_modulation.1.bias", "y_embedder.embedding_table.weight"} <= set(
        model.state_dict()
    )


def test_zero_adaln_and_zero_readout_start_at_zero_output() -> None:
    config = tiny_dit()
    x, t, cond = dit_inputs(config)
    out, (tokens,) = build_model(config)(x, t, cond, taps=(2,))
    model = build_model(config)
    assert torch.count_nonzero(out) == 0
    assert torch.equal(tokens, model.pos_embed(model.x_embedder(x)))  # zero gates: blocks are the identity
