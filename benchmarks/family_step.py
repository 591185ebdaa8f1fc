#!/usr/bin/env python
"""Forward and backward of each family against the diffusers class of the same config, as ratios from one run.

The two arms hold the same weights (ours, converted) and take turns, one pass each, so that a drifting machine slows
both alike; the medians are compared. U-ViT has no class in diffusers: it meets a plain torch writing of itself
(nn.Linear, nn.LayerNorm, scaled_dot_product_attention), defined here.

Beside the time, the peak memory of one forward and backward beyond weights and inputs: gradients, what is kept for the
backward and what is alive in between. On the CPU it is the largest sum of bytes of live tensors, followed at every
operation (scratch space inside an operation is not seen); on CUDA what its allocator reports.

OMP_NUM_THREADS=1 python benchmarks/family_step.py [--families dit,mmdit --sizes small,medium --steps 10]

--against compiled: the other arm is the same model with compiled blocks (train.compile), and memory is not followed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

FAMILIES = ("dit", "pixart", "uvit", "mmdit")
# Width, depth, side of the latent (patch 2), batch.
SIZES = {"small": (128, 4, 16, 16), "medium": (256, 6, 16, 16), "large": (512, 12, 32, 2)}
TEXT = {"dim": 512, "max_length": 32}
Pass = Callable[[], Any]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--families", default=",".join(FAMILIES), help="which of them")
    p.add_argument("--sizes", default=",".join(SIZES), help="which of them")
    p.add_argument("--steps", type=int, default=10, help="counted passes of each arm")
    p.add_argument("--warmup", type=int, default=2, help="passes of each arm that are not counted")
    p.add_argument("--against", choices=("other", "compiled"), default="other", help="what megadit's model meets")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and arithmetic")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def model_config(family: str, size: str) -> Any:
    """The architecture as diffusers' classes know it, at one of SIZES."""
    from megadit.config import ModelConfig

    width, depth, side, _ = SIZES[size]
    keys: dict[str, Any] = {"family": family, "width": width, "depth": depth, "heads": width // 64}
    keys |= {"input_size": side, "learn_sigma": family in ("dit", "pixart")}
    if family in ("pixart", "mmdit"):
        keys |= {"num_classes": 0, "text": TEXT | ({"pooled_dim": 256} if family == "mmdit" else {})}
    if family == "mmdit":
        keys |= {"qk_norm": "rms", "pos_embed_max_size": side}
    if family == "uvit":
        keys |= {"mlp": "gelu", "qkv_bias": False}
    return ModelConfig(**keys)


def _their_model(config: Any, state: dict[str, Any]) -> Any:
    """The other model with our weights, and how it is called on (x, t, cond)."""
    if config.family == "uvit":
        model = plain_uvit(config)
        model.load_state_dict(state)
        return model, lambda x, t, cond: model(x, t, cond.labels)
    import importlib

    from megadit.optional import import_diffusers

    diffusers = import_diffusers()
    convert = importlib.import_module(f"megadit.models.{config.family}.convert")
    config_json, weights = convert.to_diffusers(config, state)
    model = getattr(diffusers, config_json["_class_name"]).from_config(config_json)
    model.load_state_dict(weights)
    if config.family == "dit":
        return model, lambda x, t, cond: model(x, timestep=t, class_labels=cond.labels).sample
    if config.family == "pixart":
        return (
            model,
            lambda x, t, cond: (
                model(x, encoder_hidden_states=cond.text, timestep=t, encoder_attention_mask=cond.text_mask).sample
            ),
        )
    return (
        model,
        lambda x, t, cond: model(x, encoder_hidden_states=cond.text, pooled_projections=cond.pooled, timestep=t).sample,
    )


def plain_uvit(config: Any) -> Any:
    """U-ViT for classes as one would write it first, with the parameter names of megadit's."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from megadit.models.layers import timestep_features

    n, heads, p, channels = config.width, config.num_heads, config.patch_size, config.in_channels

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(n, 3 * n, bias=config.qkv_bias), nn.Linear(n, n)

        def forward(self, x: Any) -> Any:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, heads, n // heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.transpose(1, 2).reshape(b, t, n))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

        def forward(self, x: Any) -> Any:
            return self.fc2(F.gelu(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(n), nn.LayerNorm(n), Attention(), Mlp()
            self.skip_linear = nn.Linear(2 * n, n) if skip else None

        def forward(self, x: Any, skip: Any = None) -> Any:
            if self.skip_linear is not None:
                x = self.skip_linear(torch.cat([x, skip], dim=-1))
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Table(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(*shape))

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(channels, n, p, stride=p)

    class UViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            half, tokens = config.depth // 2, (config.input_size // p) ** 2
            self.patch_embed, self.label_emb = Patches(), nn.Embedding(config.num_classes + 1, n)
            self.pos_embed = Table(1, tokens + 2, n)
            self.in_blocks = nn.ModuleList(Block(False) for _ in range(half))
            self.mid_block = Block(False)
            self.out_blocks = nn.ModuleList(Block(True) for _ in range(half))
            self.norm, self.decoder_pred = nn.LayerNorm(n), nn.Linear(n, p * p * channels)
            self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: Any, t: Any, labels: Any) -> Any:
            b, _, height, width = x.shape
            tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
            time = timestep_features(t, n).to(x.dtype)[:, None]
            h = torch.cat([self.label_emb(labels)[:, None], time, tokens], dim=1) + self.pos_embed.weight
            skips = []
            for block in self.in_blocks:
                h = block(h)
                skips.append(h)
            h = self.mid_block(h)
            for block in self.out_blocks:
                h = block(h, skips.pop())
            pixels = self.decoder_pred(self.norm(h))[:, 2:]
            grid = pixels.reshape(b, height // p, width // p, p, p, channels)
            return self.final_layer(torch.einsum("bhwpqc->bchpwq", grid).reshape(b, channels, height, width))

    return UViT()


def live_bytes_peak(work: Pass, device: str) -> int:
    """Largest sum of bytes of tensors that ``work`` made and that were alive at one time."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    class Live(TorchDispatchMode):
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()

        def gone(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            entering = {
                leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            }
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if not isinstance(leaf, torch.Tensor):
                    continue
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in entering:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, size)
            return result

    with Live() as live:
        work()
    return live.peak


def arms_of(
    family: str, size: str, device: str, precision: str, against: str = "other"
) -> tuple[dict[str, Pass], float]:
    """One forward and backward of ours and of theirs, and how far their outputs lie apart, relative."""
    import torch

    from megadit import rng
    from megadit.models import build_model
    from megadit.mup.example import example_conditioning, example_images

    config, batch = model_config(family, size), SIZES[size][3]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours = build_model(config)
    with torch.no_grad():  # zero gates would hide a difference between the two
        for name, param in ours.named_parameters():
            param.copy_(0.05 * rng.normal(rng.stream_key(0, name), param.shape))
    if against == "compiled":
        other = call = copy.deepcopy(ours)
        other.compile_blocks()
    else:
        other, call = _their_model(config, {name: value.clone() for name, value in ours.state_dict().items()})
    if device != "cpu" or precision != "fp32":
        for model in (ours, other):
            model.to(device=device, dtype=dtype)
    numbers = range(batch)
    x, cond = example_images(config, numbers).to(device, dtype), example_conditioning(config, numbers).to(device)
    if cond.text is not None:
        text = cond.text.to(dtype)
        mask = cond.text_mask if family == "pixart" else None  # diffusers' SD3 class has no mask
        pooled = None if cond.pooled is None else cond.pooled.to(dtype)
        cond = type(cond)(text=text, text_mask=mask, pooled=pooled)
    t = torch.linspace(0, 999, batch, device=device).round()

    def one(model: Any, forward: Callable[[Any, Any, Any], Any]) -> Pass:
        def work() -> None:
            for param in model.parameters():
                param.grad = None
            forward(x, t, cond).square().mean().backward()
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return work

    with torch.no_grad():
        mine, theirs = ours(x, t, cond).float(), call(x, t, cond).float()
    gap = float((mine - theirs).norm() / theirs.norm())
    return {"megadit": one(ours, ours), "other": one(other, call)}, gap


def compare(arms: dict[str, Pass], warmup: int, steps: int, device: str, *, memory: bool = True) -> dict[str, Any]:
    """Medians of interleaved passes and, with ``memory``, its peaks, and their ratios."""
    from benchmarks.arms import median_seconds

    medians = median_seconds(arms, warmup, steps)
    times = {
        "ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "time_ratio": round(medians["megadit"] / medians["other"], 3),
    }
    if not memory:
        return times
    peaks = {name: live_bytes_peak(work, device) for name, work in arms.items()}
    return times | {
        "peak_mb": {name: round(value / 1e6, 1) for name, value in peaks.items()},
        "memory_ratio": round(peaks["megadit"] / peaks["other"], 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    import torch

    results = []
    for family in args.families.split(","):
        for size in args.sizes.split(","):
            arms, gap = arms_of(family, size, args.device, args.precision, args.against)
            row = {"family": family, "size": size, "output_gap": float(f"{gap:.2g}")}
            memory = args.against == "other"
            results.append(row | compare(arms, args.warmup, args.steps, args.device, memory=memory))
            if not args.json:
                _print_row(results[-1], heading=len(results) == 1)
    if args.json:
        threads = torch.get_num_threads()
        print(json.dumps({"threads": threads, "device": args.device, "precision": args.precision, "results": results}))
    return 0


def _print_row(row: dict[str, Any], heading: bool) -> None:
    if heading:
        columns = f"{'megadit':>12}{'other':>12}{'ratio':>8}"
        print(f"{'family':8}{'size':8}{columns}{columns if 'peak_mb' in row else ''}")
    ms = row["ms"]
    times = f"{ms['megadit']:>9.1f} ms{ms['other']:>9.1f} ms{row['time_ratio']:>8.3f}"
    if "peak_mb" not in row:
        print(f"{row['family']:8}{row['size']:8}{times}", flush=True)
        return
    mb = row["peak_mb"]
    memory = f"{mb['megadit']:>9.1f} MB{mb['other']:>9.1f} MB{row['memory_ratio']:>8.3f}"
    print(f"{row['family']:8}{row['size']:8}{times}{memory}", flush=True)


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
