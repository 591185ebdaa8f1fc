"""A second, plain writing of MMDiT: one function over a dict of weights, token by token where masks are concerned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.config import ModelConfig

Weights = dict[str, Tensor]


def mmdit_positions(config: ModelConfig, rows: int, columns: int) -> Tensor:
    """(rows * columns, n) float64 of float32 values: coordinate by coordinate, channel by channel."""
    base, largest = config.input_size // config.patch_size, config.pos_embed_max_size
    quarter = config.width // 4
    table = torch.zeros(rows, columns, config.width, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            if largest:
                position = [((largest - columns) // 2 + column, largest), ((largest - rows) // 2 + row, largest)]
            else:
                position = [(column, columns), (row, rows)]
            for half, (index, count) in enumerate(position):
                # float32 as the originals: the stretched coordinate is what a table is computed from
                coordinate = float(torch.tensor(index, dtype=torch.float32) / (count / base))
                for i in range(quarter):
                    angle = coordinate * 10000.0 ** (-i / quarter)
                    table[row, column, 2 * half * quarter + i] = math.sin(angle)
                    table[row, column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return table.reshape(rows * columns, config.width).float().double()


def _linear(w: Weights, name: str, x: Tensor, mult: float = 1.0) -> Tensor:
    out = mult * (x @ w[f"{name}.weight"].T)
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift


def _rms(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"] if f"{name}.weight" in w else x


def _mlp(w: Weights, name: str, x: Tensor, kind: str) -> Tensor:
    h = _linear(w, f"{name}.fc1", x)
    if kind == "swiglu":
        gate, up = h.split(h.shape[-1] // 2, dim=-1)
        h = _silu(gate) * up
    elif kind == "gelu":
        h = h / 2 * (1 + torch.erf(h / math.sqrt(2)))
    else:
        h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(w, f"{name}.fc2", h)


def _attend(q: Tensor, k: Tensor, v: Tensor, attended: list[list[int]]) -> Tensor:
    """Softmax attention, one sample and one head at a time; keys that are not ``kept`` are taken out, not masked."""
    out = torch.zeros_like(q)
    samples = []
    for b, tokens in enumerate(attended):
        heads = []
        for head in range(q.shape[2]):
            scores = q[b, :, head] @ k[b, tokens, head].T / math.sqrt(q.shape[-1])
            heads.append(torch.softmax(scores, dim=-1) @ v[b, tokens, head])
        samples.append(torch.stack(heads, dim=1))
    return out + torch.stack(samples)


def reference_mmdit(config: ModelConfig, w: Weights, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Output of MMDiT at float64 ``w`` (SD3's names); features and positions enter as float32 values."""
    assert cond.text is not None
    b, channels, height, width = x.shape
    p, heads = config.patch_size, config.num_heads
    rows, columns = height // p, width // p
    image_count, text_count = rows * columns, cond.text.shape[1]

    patches = torch.zeros(b, image_count, channels * p * p, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            piece = x[:, :, row * p : row * p + p, column * p : column * p + p]
            patches[:, row * columns + column] = piece.reshape(b, -1).double()
    projection = {"p.weight": w["x_embedder.proj.weight"].flatten(1), "p.bias": w["x_embedder.proj.bias"]}
    streams = {
        "x_block": _linear(projection, "p", patches) + mmdit_positions(config, rows, columns),
        "context_block": _linear(w, "context_embedder", cond.text.double()),
    }
    angle = t.float()[:, None] * torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10000.0) / 128))
    c = _linear(w, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1).double())
    c = _linear(w, "t_embedder.mlp.2", _silu(c))
    if cond.pooled is not None:
        c = c + _linear(w, "y_embedder.mlp.2", _silu(_linear(w, "y_embedder.mlp.0", cond.pooled.double())))
    c = _silu(c)[:, None]

    attended = [list(range(image_count + text_count)) for _ in range(b)]
    if cond.text_mask is not None:
        attended = [[i for i in range(image_count + text_count) if i < image_count or m[i - image_count]]
                for m in cond.text_mask.tolist()]  # fmt: skip
    for i in range(config.depth):
        pre_only = i == config.depth - 1
        later, parts = {}, []
        for stream, tokens in streams.items():
            name = f"joint_blocks.{i}.{stream}"
            count = 2 if pre_only and stream == "context_block" else 6
            shift, scale, *later[stream] = _linear(w, f"{name}.adaLN_modulation.1", c).chunk(count, dim=-1)
            qkv = _linear(w, f"{name}.attn.qkv", _modulated(tokens, shift, scale))
            q, k, v = (z.reshape(b, -1, heads, config.head_channels) for z in qkv.split(config.width, dim=-1))
            parts.append((_rms(w, f"{name}.attn.ln_q", q), _rms(w, f"{name}.attn.ln_k", k), v))
        mixed = _attend(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)), attended).reshape(
            b, -1, config.width
        )
        answers = {"x_block": mixed[:, :image_count], "context_block": mixed[:, image_count:]}
        for stream in ["x_block"] if pre_only else ["x_block", "context_block"]:
            name = f"joint_blocks.{i}.{stream}"
            gate1, shift, scale, gate2 = later[stream]
            tokens = streams[stream] + gate1 * _linear(w, f"{name}.attn.proj", answers[stream])
            mlp = _mlp(w, f"{name}.mlp", _modulated(tokens, shift, scale), config.mlp)
            streams[stream] = tokens + gate2 * mlp

    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    mult = config.output_mult / config.width_mult
    pixels = _linear(w, "final_layer.linear", _modulated(streams["x_block"], shift, scale), mult)
    image = torch.zeros(b, config.out_channels, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            start = ((row % p) * p + column % p) * config.out_channels
            token = (row // p) * columns + column // p
            image[:, :, row, column] = pixels[:, token, start : start + config.out_channels]
    return image
