"""DiT against diffusers' DiTTransformer2DModel with its two departures from the official code put right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.models import build_model

_BLOCK_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_TOP_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_COPIED_NAMES = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def _target_names(name: str, depth: int) -> list[list[str]]:
    """Where our parameter lives there: pieces along dim 0, each with its copies (one per block for embedders)."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return [[f"{_TOP_NAMES[stem]}.{kind}"]]
    if stem in _COPIED_NAMES:
        return [[f"transformer_blocks.{i}.norm1.emb.{_COPIED_NAMES[stem]}.{kind}" for i in range(depth)]]
    _, index, module = stem.split(".", 2)
    if module == "attn.qkv":
        return [[f"transformer_blocks.{index}.attn1.to_{part}.{kind}"] for part in "qkv"]
    return [[f"transformer_blocks.{index}.{_BLOCK_NAMES[module]}.{kind}"]]


def _corrected_diffusers(config: ModelConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_channels,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    for module in theirs.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    return theirs


@torch.no_grad()
def _load(theirs: nn.Module, ours: nn.Module, depth: int) -> None:
    targets = dict(theirs.named_parameters())
    filled: set[str] = set()
    for name, param in ours.named_parameters():
        target_names = _target_names(name, depth)
        for copies, piece in zip(target_names, param.chunk(len(target_names)), strict=True):
            for target in copies:
                targets[target].copy_(piece.view_as(targets[target]))
                filled.add(target)
    assert filled == set(targets)


def _gradient(theirs: dict[str, Tensor], name: str, depth: int) -> Tensor:
    """Their gradient of our parameter: copies sum, pieces join."""
    return torch.cat(
        [sum((theirs[target] for target in copies), torch.zeros(())) for copies in _target_names(name, depth)]
    )


def test_outputs_and_all_gradients_equal_diffusers() -> None:
    config = tiny_dit(width=144, depth=3)
    ours = build_model(config)
    randomize(ours, 0.05)
    theirs = _corrected_diffusers(config)
    _load(theirs, ours, config.depth)
    x, t, cond = dit_inputs(config)
    t = t.round()
    out = ours(x, t, cond)
    expected = theirs(x, timestep=t, class_labels=cond.labels).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)

    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: torch.zeros(()) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        assert param.grad is not None
        expected_grad = _gradient(gradients, name, config.depth).view_as(param.grad)
        torch.testing.assert_close(param.grad, expected_grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        if not name.endswith("attn.qkv.bias"):  # a third of it, the key part, has a zero gradient
            torch.testing.assert_close(param.grad.norm(), expected_grad.norm(), rtol=1e-4, atol=0)
