"""A second, plain writing of DiT: one function over a dict of weights, softmax and formulas spelled out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.config import ModelConfig


def reference_positions(dim: int, side: int) -> Tensor:
    """(side^2, dim) float64 table, channel by channel from the formula: column first, then row."""
    table = torch.zeros(side * side, dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                token = table[row * side + column]
                token[i], token[quarter + i] = math.sin(column * omega), math.cos(column * omega)
                token[2 * quarter + i], token[3 * quarter + i] = math.sin(row * omega), math.cos(row * omega)
    return table


def _linear(w: dict[str, Tensor], name: str, x: Tensor, mult: float = 1.0) -> Tensor:
    return mult * (x @ w[f"{name}.weight"].T) + w[f"{name}.bias"]


def _norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def _attention(w: dict[str, Tensor], name: str, x: Tensor, config: ModelConfig) -> Tensor:
    b, t, n = x.shape
    heads, d = config.num_heads, config.head_channels
    q, k, v = (part.reshape(b, t, heads, d).transpose(1, 2) for part in _linear(w, f"{name}.qkv", x).split(n, dim=-1))
    if config.qk_norm == "rms":
        q, k = _rms(q, w[f"{name}.q_norm.weight"]), _rms(k, w[f"{name}.k_norm.weight"])
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d), dim=-1)
    return _linear(w, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(b, t, n))


def _mlp(w: dict[str, Tensor], name: str, x: Tensor, config: ModelConfig) -> Tensor:
    h = _linear(w, f"{name}.fc1", x)
    if config.mlp == "swiglu":
        half = h.shape[-1] // 2
        h = h[..., :half] * torch.sigmoid(h[..., :half]) * h[..., half:]
    elif config.mlp == "gelu":
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(w, f"{name}.fc2", h)


def reference_dit(
    config: ModelConfig, weights: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor | None
) -> Tensor:
    """Output of DiT at ``weights`` (official names), in their dtype; features and positions enter as float32 values."""
    w = weights
    dtype = w["final_layer.linear.weight"].dtype
    p, side = config.patch_size, config.input_size // config.patch_size
    tokens = F.conv2d(x.to(dtype), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    tokens = tokens.flatten(2).transpose(1, 2) + reference_positions(config.width, side).float().to(dtype)

    frequency = torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10000.0) / 128))
    angle = t.float()[:, None] * frequency
    c = _linear(w, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))
    c = _linear(w, "t_embedder.mlp.2", c * torch.sigmoid(c))
    if labels is not None:
        c = c + w["y_embedder.embedding_table.weight"][labels]
    c = (c * torch.sigmoid(c))[:, None]

    for i in range(config.depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = _linear(w, f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=-1)
        tokens = tokens + gate1 * _attention(w, f"blocks.{i}.attn", _norm(tokens) * (1 + scale1) + shift1, config)
        tokens = tokens + gate2 * _mlp(w, f"blocks.{i}.mlp", _norm(tokens) * (1 + scale2) + shift2, config)

    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    mult = config.output_mult / config.width_mult
    patches = _linear(w, "final_layer.linear", _norm(tokens) * (1 + scale) + shift, mult)
    image = torch.zeros(x.shape[0], config.out_channels, config.input_size, config.input_size, dtype=dtype)
    channels = config.out_channels
    for row in range(side):
        for column in range(side):
            for i in range(p):
                for j in range(p):
                    start = (i * p + j) * channels
                    piece = patches[:, row * side + column, start : start + channels]
                    image[:, :, row * p + i, column * p + j] = piece
    return image
