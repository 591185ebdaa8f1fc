"""A second, plain writing of PixArt-alpha: one sample at a time, masked text cut off, formulas spelled out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.config import ModelConfig

Weights = dict[str, Tensor]


def _linear(w: Weights, name: str, x: Tensor, mult: float = 1.0) -> Tensor:
    y = mult * (x @ w[f"{name}.weight"].T)
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _heads(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Attention of q (T, n) to k and v (S, n), head by head."""
    parts = []
    for start in range(0, q.shape[1], head_dim):
        here = slice(start, start + head_dim)
        weights = torch.softmax(q[:, here] @ k[:, here].T / math.sqrt(head_dim), dim=-1)
        parts.append(weights @ v[:, here])
    return torch.cat(parts, dim=1)


def _self_attention(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    n, d = config.width, config.head_channels
    qkv = _linear(w, f"{name}.qkv", x)
    q, k, v = qkv[:, :n], qkv[:, n : 2 * n], qkv[:, 2 * n :]
    if config.qk_norm == "rms":
        q = _rms(q.reshape(-1, d), w[f"{name}.q_norm.weight"]).reshape(-1, n)
        k = _rms(k.reshape(-1, d), w[f"{name}.k_norm.weight"]).reshape(-1, n)
    return _linear(w, f"{name}.proj", _heads(q, k, v, d))


def _cross_attention(w: Weights, name: str, x: Tensor, text: Tensor, config: ModelConfig) -> Tensor:
    n = config.width
    kv = _linear(w, f"{name}.kv_linear", text)
    return _linear(
        w, f"{name}.proj", _heads(_linear(w, f"{name}.q_linear", x), kv[:, :n], kv[:, n:], config.head_channels)
    )


def _mlp(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    h = _linear(w, f"{name}.fc1", x)
    if config.mlp == "swiglu":
        half = h.shape[-1] // 2
        h = _silu(h[:, :half]) * h[:, half:]
    elif config.mlp == "gelu":
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    else:
        h = _gelu_tanh(h)
    return _linear(w, f"{name}.fc2", h)


def _positions(config: ModelConfig) -> Tensor:
    """(T, n) float32 values in float64: sin, cos of the column, then of the row, coordinates over pos_scale."""
    side, quarter = config.input_size // config.patch_size, config.width // 4
    omega = [10000.0 ** (-i / quarter) for i in range(quarter)]
    tokens = []
    for row in range(side):
        for column in range(side):
            r, c = (float(torch.tensor(float(p)) / config.pos_scale) for p in (row, column))
            waves = [f(p * o) for p in (c, r) for f in (math.sin, math.cos) for o in omega]
            tokens.append(torch.tensor(waves, dtype=torch.float64))
    return torch.stack(tokens).float()


def reference_pixart(
    config: ModelConfig, weights: Weights, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None
) -> Tensor:
    """Output of PixArt at ``weights`` (official names), in their dtype."""
    dtype = weights["final_layer.linear.weight"].dtype
    outputs = []
    for number in range(x.shape[0]):
        words = text[number] if mask is None else text[number][mask[number]]  # padding is dropped
        outputs.append(_one(config, weights, x[number].to(dtype), t[number], words.to(dtype)))
    return torch.stack(outputs)


def _one(config: ModelConfig, w: Weights, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
    dtype, p, side, n = x.dtype, config.patch_size, config.input_size // config.patch_size, config.width
    tokens = F.conv2d(x[None], w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)[0]
    tokens = tokens.flatten(1).T + _positions(config).to(dtype)
    angle = t.float() * torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10000.0) / 128))
    t_emb = _linear(w, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]).to(dtype))
    t_emb = _linear(w, "t_embedder.mlp.2", _silu(t_emb))
    t0 = _linear(w, "t_block.1", _silu(t_emb)).reshape(6, n)
    words = _linear(w, "y_embedder.y_proj.fc2", _gelu_tanh(_linear(w, "y_embedder.y_proj.fc1", words)))

    for i in range(config.depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = w[f"blocks.{i}.scale_shift_table"] + t0
        normed = _norm(tokens) * (1 + scale1) + shift1
        tokens = tokens + gate1 * _self_attention(w, f"blocks.{i}.attn", normed, config)
        tokens = tokens + _cross_attention(w, f"blocks.{i}.cross_attn", tokens, words, config)
        tokens = tokens + gate2 * _mlp(w, f"blocks.{i}.mlp", _norm(tokens) * (1 + scale2) + shift2, config)

    shift, scale = w["final_layer.scale_shift_table"] + t_emb
    mult = config.output_mult / config.width_mult
    patches = _linear(w, "final_layer.linear", _norm(tokens) * (1 + scale) + shift, mult)
    channels = config.out_channels
    image = torch.zeros(channels, config.input_size, config.input_size, dtype=dtype)
    for row in range(side):
        for column in range(side):
            for i in range(p):
                for j in range(p):
                    start = (i * p + j) * channels
                    image[:, row * p + i, column * p + j] = patches[row * side + column, start : start + channels]
    return image
