"""A second, plain writing of U-ViT: one function over a dict of weights, a sample at a time, formulas spelled out.

A masked text token is not masked here but left out of the sequence, with its position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.config import ModelConfig

Weights = dict[str, Tensor]


def _linear(w: Weights, name: str, x: Tensor, mult: float) -> Tensor:
    y = (mult * x) @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def _attention(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    heads, d, mult = config.num_heads, config.head_channels, config.role_hps.hidden.mult
    joint = _linear(w, f"{name}.qkv", x, mult)
    mixed = []
    for head in range(heads):
        q, k, v = (joint[:, (part * heads + head) * d : (part * heads + head + 1) * d] for part in range(3))
        if config.qk_norm == "rms":
            q, k = _rms(q, w[f"{name}.q_norm.weight"]), _rms(k, w[f"{name}.k_norm.weight"])
        mixed.append(torch.softmax(q @ k.T / math.sqrt(d), dim=-1) @ v)
    return _linear(w, f"{name}.proj", torch.cat(mixed, dim=-1), mult)


def _mlp(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    mult = config.role_hps.hidden.mult
    h = _linear(w, f"{name}.fc1", x, mult)
    if config.mlp == "swiglu":
        half = h.shape[-1] // 2
        h = h[..., :half] * torch.sigmoid(h[..., :half]) * h[..., half:]
    elif config.mlp == "gelu":
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(w, f"{name}.fc2", h, mult)


def _block(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    x = x + _attention(w, f"{name}.attn", _norm(w, f"{name}.norm1", x), config)
    return x + _mlp(w, f"{name}.mlp", _norm(w, f"{name}.norm2", x), config)


def _time_token(w: Weights, t: Tensor, config: ModelConfig) -> Tensor:
    half = config.width // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half))
    features = torch.cat([torch.cos(t.float() * frequency), torch.sin(t.float() * frequency)])
    token = features.to(w["norm.weight"].dtype)
    if config.mlp_time_embed:
        hidden = _linear(w, "time_embed.0", token, config.role_hps.hidden.mult)
        token = _linear(w, "time_embed.2", hidden * torch.sigmoid(hidden), config.role_hps.hidden.mult)
    return token


def _one(
    config: ModelConfig, w: Weights, x: Tensor, t: Tensor, label: Tensor | None, text: Tensor | None, attended: Tensor
) -> Tensor:
    """One image (C, H, W); ``seen`` says for each text token whether there is one."""
    p, side = config.patch_size, config.input_size // config.patch_size
    hps = config.role_hps
    kernel = w["patch_embed.proj.weight"]
    tokens = [_time_token(w, t, config)]
    positions = [0]
    if label is not None:
        tokens.insert(0, hps.input.mult * w["label_emb.weight"][label])
        positions = [0, 1]
    extras = len(tokens)
    if text is not None:
        words = _linear(w, "context_embed", text, hps.input.mult)
        tokens += [word for word, there in zip(words, attended, strict=True) if there]
        positions += [1 + i for i, there in enumerate(attended) if there]
        extras += len(text)
    for row in range(side):
        for column in range(side):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(hps.input.mult * torch.einsum("ncij,cij->n", kernel, patch) + w["patch_embed.proj.bias"])
            positions.append(extras + row * side + column)
    h = torch.stack(tokens) + hps.input.mult * w["pos_embed.weight"][0, positions]

    skips = []
    for i in range(config.depth // 2):
        h = _block(w, f"in_blocks.{i}", h, config)
        skips.append(h)
    h = _block(w, "mid_block", h, config)
    for i in range(config.depth // 2):
        h = _linear(w, f"out_blocks.{i}.skip_linear", torch.cat([h, skips.pop()], dim=-1), hps.hidden.mult)
        h = _block(w, f"out_blocks.{i}", h, config)

    mult = config.output_mult / config.width_mult
    patches = _linear(w, "decoder_pred", _norm(w, "norm", h), mult)[-side * side :]
    image = torch.zeros(config.out_channels, config.input_size, config.input_size, dtype=h.dtype)
    for row in range(side):
        for column in range(side):
            piece = patches[row * side + column].reshape(p, p, config.out_channels).permute(2, 0, 1)
            image[:, row * p : (row + 1) * p, column * p : (column + 1) * p] = piece
    if not config.conv:
        return image
    rim = F.pad(hps.finite.mult * image, (1, 1, 1, 1))
    smooth = w["final_layer.bias"][:, None, None].expand_as(image).clone()
    for i in range(3):
        for j in range(3):
            window = rim[:, i : i + config.input_size, j : j + config.input_size]
            smooth = smooth + torch.einsum("oc,chw->ohw", w["final_layer.weight"][:, :, i, j], window)
    return smooth


def reference_uvit(
    config: ModelConfig,
    weights: Weights,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    text: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Output of U-ViT at ``weights`` (our names), in their dtype; the timestep's features enter as float32 values."""
    dtype = weights["norm.weight"].dtype
    images = []
    for b in range(len(x)):
        length = 0 if text is None else text.shape[1]
        attended = torch.ones(length, dtype=torch.bool) if mask is None else mask[b]
        words = None if text is None else text[b].to(dtype)
        images.append(
            _one(config, weights, x[b].to(dtype), t[b], None if labels is None else labels[b], words, attended)
        )
    return torch.stack(images)
