"""The four families' releases, key by key, as their authors' files have them: names and shapes written out by hand.

Sizes are tiny: width 48, 2 heads, patches of 2, inputs of 4 x 8 x 8, 10 classes; texts of 7 tokens of 20 channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.models.reference_dit import reference_positions

State = dict[str, Tensor]
_N, _HIDDEN, _PATCH, _CHANNELS = 48, 192, 2, 4


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _patches(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (_N, _CHANNELS, _PATCH, _PATCH), f"{name}.bias": (_N,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (_N,), f"{name}.bias": (_N,)}


def _dit() -> dict[str, tuple[int, ...]]:
    """facebookresearch/DiT, models.py: DiT-XL-2-256x256.pt with fewer blocks."""
    shapes = {
        "pos_embed": (1, 16, _N),
        **_patches("x_embedder.proj"),
        **_linear("t_embedder.mlp.0", _N, 256),
        **_linear("t_embedder.mlp.2", _N, _N),
        "y_embedder.embedding_table.weight": (11, _N),
    }
    for block in ("blocks.0", "blocks.1"):
        shapes |= _linear(f"{block}.attn.qkv", 3 * _N, _N) | _linear(f"{block}.attn.proj", _N, _N)
        shapes |= _linear(f"{block}.mlp.fc1", _HIDDEN, _N) | _linear(f"{block}.mlp.fc2", _N, _HIDDEN)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 6 * _N, _N)
    shapes |= _linear("final_layer.linear", _PATCH**2 * 2 * _CHANNELS, _N)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * _N, _N)


def _pixart() -> dict[str, tuple[int, ...]]:
    """PixArt-alpha, PixArt.py: what stands below state_dict in PixArt-XL-2-256x256.pth."""
    shapes = {
        "pos_embed": (1, 16, _N),
        **_patches("x_embedder.proj"),
        **_linear("t_embedder.mlp.0", _N, 256),
        **_linear("t_embedder.mlp.2", _N, _N),
        **_linear("t_block.1", 6 * _N, _N),
        "y_embedder.y_embedding": (7, 20),
        **_linear("y_embedder.y_proj.fc1", _N, 20),
        **_linear("y_embedder.y_proj.fc2", _N, _N),
    }
    for block in ("blocks.0", "blocks.1"):
        shapes[f"{block}.scale_shift_table"] = (6, _N)
        shapes |= _linear(f"{block}.attn.qkv", 3 * _N, _N) | _linear(f"{block}.attn.proj", _N, _N)
        shapes |= _linear(f"{block}.cross_attn.q_linear", _N, _N)
        shapes |= _linear(f"{block}.cross_attn.kv_linear", 2 * _N, _N)
        shapes |= _linear(f"{block}.cross_attn.proj", _N, _N)
        shapes |= _linear(f"{block}.mlp.fc1", _HIDDEN, _N) | _linear(f"{block}.mlp.fc2", _N, _HIDDEN)
    shapes["final_layer.scale_shift_table"] = (2, _N)
    return shapes | _linear("final_layer.linear", _PATCH**2 * 2 * _CHANNELS, _N)


def _uvit() -> dict[str, tuple[int, ...]]:
    """baofff/U-ViT, libs/uvit.py: imagenet256_uvit_large.pth with fewer blocks."""
    shapes = {"pos_embed": (1, 18, _N), **_patches("patch_embed.proj"), "label_emb.weight": (11, _N)}
    for block in ("in_blocks.0", "mid_block", "out_blocks.0"):
        shapes |= _norm(f"{block}.norm1") | {f"{block}.attn.qkv.weight": (3 * _N, _N)}
        shapes |= _linear(f"{block}.attn.proj", _N, _N) | _norm(f"{block}.norm2")
        shapes |= _linear(f"{block}.mlp.fc1", _HIDDEN, _N) | _linear(f"{block}.mlp.fc2", _N, _HIDDEN)
    shapes |= _linear("out_blocks.0.skip_linear", _N, 2 * _N) | _norm("norm")
    shapes |= _linear("decoder_pred", _PATCH**2 * _CHANNELS, _N)
    return shapes | {"final_layer.weight": (_CHANNELS, _CHANNELS, 3, 3), "final_layer.bias": (_CHANNELS,)}


def _mmdit() -> dict[str, tuple[int, ...]]:
    """Stable Diffusion 3's MMDiT: what stands below model.diffusion_model in sd3_medium.safetensors."""
    shapes = {
        "pos_embed": (1, 36, _N),
        **_patches("x_embedder.proj"),
        **_linear("t_embedder.mlp.0", _N, 256),
        **_linear("t_embedder.mlp.2", _N, _N),
        **_linear("y_embedder.mlp.0", _N, 12),
        **_linear("y_embedder.mlp.2", _N, _N),
        **_linear("context_embedder", _N, 20),
    }
    for block in ("joint_blocks.0.context_block", "joint_blocks.0.x_block", "joint_blocks.1.x_block"):
        shapes |= _linear(f"{block}.attn.qkv", 3 * _N, _N) | _linear(f"{block}.attn.proj", _N, _N)
        shapes |= _linear(f"{block}.mlp.fc1", _HIDDEN, _N) | _linear(f"{block}.mlp.fc2", _N, _HIDDEN)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 6 * _N, _N)
    shapes |= _linear("joint_blocks.1.context_block.attn.qkv", 3 * _N, _N)
    shapes |= _linear("joint_blocks.1.context_block.adaLN_modulation.1", 2 * _N, _N)
    shapes |= _linear("final_layer.linear", _PATCH**2 * _CHANNELS, _N)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * _N, _N)


_SHAPES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "dit": _dit,
    "pixart": _pixart,
    "uvit": _uvit,
    "mmdit": _mmdit,
}


def release(family: str, seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Random weights under the release's names, in its order; fixed positions are the formula's."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in _SHAPES[family]().items()}
    if family in ("dit", "pixart"):
        state["pos_embed"] = reference_positions(_N, 4).float()[None]
    if family == "mmdit":  # the table of 6 x 6 patches, whose middle 4 x 4 an input of 8 x 8 takes
        state["pos_embed"] = stretched(6, 4)[None]
    return {name: value.to(dtype) for name, value in state.items()}


def stretched(side: int, base: int) -> Tensor:
    """Sin-cos positions of a grid whose coordinates are stretched to those of ``base`` patches."""
    quarter = _N // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    position = (torch.arange(side, dtype=torch.float32) / (side / base)).double()
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    waves = [f(axis.reshape(-1, 1) * omega) for axis in (columns, rows) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1).float()
