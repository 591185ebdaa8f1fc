#!/usr/bin/env python
"""Blocks and whole models on a GPU: TFLOP/s, MFU, memory, and DiT-XL/2's images/s against diffusers' class.

A block of DiT-XL/2 and of MMDiT-18B (width 5120), forward and backward in bfloat16: by torch's kernels, by the fused
ones, and by these with products in FP8 (train.precision fp8), each also compiled as train.compile compiles. Then whole
models: one optimizer step of DiT-XL/2 against DiTTransformer2DModel with scaled_dot_product_attention in bfloat16,
eager and compiled, and against it as the official code runs (float32 weights, TF32 products, attention that is no fused
kernel); forward and backward of MMDiT-18B with recomputed blocks.

    MFU = 3 F images / (seconds P)

F: FLOPs of one image's forward pass, matrix products and attention, counted by torch (megadit.plan.flops); a backward
pass is two of it, what is recomputed does not count. P: the data sheet's dense bf16 peak; "of measured" takes the peak
of a square bf16 product that is measured in the same run.

python benchmarks/blocks.py [--parts dit_block,dit_step --out FILE]
python benchmarks/blocks.py --dry_run        # the same lines on the CPU at tiny sizes
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

FORMULA = "MFU = 3 F images / (seconds P), F: forward FLOPs of one image, P: dense bf16 peak of the data sheet"
PARTS = ("dit_block", "mmdit_block", "dit_step", "mmdit_model")
COLUMNS = ("part", "arm", "images", "ms", "images/s", "TFLOP/s", "MFU", "of measured", "peak GB")
# Of the timed parts the images of a pass: on one H200 all arms of a part lie in memory beside each other.
_IMAGES = {"dit_block": 256, "mmdit_block": 64, "dit_step": 64, "mmdit_model": 16}


def parser() -> argparse.ArgumentParser:
    from benchmarks.gpu_timing import common_parser

    p = common_parser(__doc__, seconds=240)
    p.add_argument("--parts", default=",".join(PARTS), help="which of them (default: all)")
    p.add_argument("--images", type=int, help="images of a pass (default: 16 to 256, by part)")
    return p


def model_config(part: str, dry_run: bool, **changes: Any) -> Any:
    """The configuration file's model at full size, or a tiny one of the same family; of a block's part one block."""
    from megadit.config import ModelConfig, load_config

    family = part.split("_")[0]
    keys = load_config({"dit": "dit/xl-2-mup.yaml", "mmdit": "mmdit/18b-mup.yaml"}[family]).model
    values = keys.model_dump(exclude_unset=True) | {"repa": None}
    if part.endswith("block"):
        values["depth"] = 2  # the last block of MMDiT differs; the first one is timed
    if dry_run:
        values |= {"width": 64, "heads": 4, "head_dim": None, "depth": 2, "input_size": 8}
        values |= {"num_classes": 10} if family == "dit" else {"text": {"dim": 16, "max_length": 4}}
    return ModelConfig(**values | changes)


class Selection:
    """Switches all operations between their fused and torch implementations, outside of what is timed."""

    def __init__(self, warm: Callable[[], Any]) -> None:
        """``warm`` calls every operation once, so that no dispatch is decided while a compiled model runs."""
        self._warm, self._current = warm, ""

    def __call__(self, choice: str) -> None:
        if choice == self._current:
            return
        from megadit_kernels import select_all

        select_all(choice)
        self._current = choice
        self._warm()


def built(config: Any, device: str, dtype: Any) -> Any:
    """The model on ``device`` in ``dtype``, normal weights: no gate is closed, which would stop gradients."""
    import torch

    from megadit.models import build_model

    model = build_model(config, device="meta").to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def inputs_of(config: Any, images: int, device: str, dtype: Any) -> tuple[Any, Any, Any]:
    """x, t and the condition, texts of full length without a mask."""
    import torch

    from megadit.conditioning import Conditioning

    x = torch.randn(images, config.in_channels, config.input_size, config.input_size, device=device, dtype=dtype)
    t = torch.linspace(0, 999, images, device=device).round()
    if config.text is None:
        return x, t, Conditioning(labels=torch.arange(images, device=device) % config.num_classes)
    text = torch.randn(images, config.text.max_length, config.text.dim, device=device, dtype=dtype)
    return x, t, Conditioning(text=text)


def forward_backward(function: Callable[[], Any], parameters: list[Any]) -> Callable[[], None]:
    """One pass, from empty gradients."""

    def work() -> None:
        for parameter in parameters:
            parameter.grad = None
        outputs = function()
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.float().square().mean().backward()

    return work


def has_fp8(device: str) -> bool:
    """Whether this GPU has FP8 units; a CPU emulates them."""
    import torch

    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def block_arms(part: str, images: int, device: str, dry_run: bool, deadline: Any) -> tuple[dict[str, Any], int]:
    """Arms of one block of the model, and the FLOPs of one image's forward pass."""
    import torch

    from benchmarks.gpu_timing import Arm
    from megadit.config.schema.float8 import Float8Config
    from megadit.models.float8 import set_float8
    from megadit.plan.flops import stage_flops

    config = model_config(part, dry_run)
    model = built(config, device, torch.bfloat16)
    embed, block = model.stages()[:2]
    with torch.no_grad():
        state = embed(model.packed_inputs(*inputs_of(config, images, device, torch.bfloat16)))
    state = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in state)

    def warm() -> None:
        with torch.no_grad():
            block(state)

    selection, arms = Selection(warm), {}

    def add(name: str, stage: Any, choice: str) -> None:
        backend = "eager" if dry_run else "inductor"
        compiled = torch.compile(stage.forward, fullgraph=True, dynamic=False, backend=backend)
        leaves = [*stage.parameters(), *(part for part in state if part.requires_grad)]
        for suffix, function in (("", stage), (" compiled", compiled)):
            work = forward_backward(functools.partial(function, state), leaves)
            arms[name + suffix] = Arm(work, functools.partial(selection, choice))

    add("fused", block, "fused")
    add("torch", block, "torch")
    if has_fp8(device):
        eights = built(config, device, torch.bfloat16)
        set_float8(eights, Float8Config())
        add("fp8", eights.stages()[1], "fused")
    else:
        deadline.skip(f"{part} in FP8", "a GPU with FP8 units, sm_89 or later")
    return arms, stage_flops(config)[1]


def train_step(model: Any, forward: Callable[[], Any]) -> Callable[[], None]:
    """Forward, backward and torch's fused AdamW, the same in every arm."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    work = forward_backward(forward, list(model.parameters()))

    def step() -> None:
        work()
        optimizer.step()

    return step


def diffusers_dit(config: Any, device: str, dtype: Any, plain_attention: bool) -> Any:
    """DiTTransformer2DModel of the same sizes; ``plain_attention``: scores and softmax are operations of their own."""
    import torch

    from benchmarks.step_time import diffusers_model

    model = diffusers_model(config)
    if plain_attention:
        from diffusers.models.attention_processor import AttnProcessor

        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.to(device=device, dtype=dtype)


def step_arms(images: int, device: str, dry_run: bool, deadline: Any) -> tuple[dict[str, Any], int]:
    """Optimizer steps of DiT-XL/2: ours and diffusers'."""
    import torch

    from benchmarks.gpu_timing import Arm, tf32
    from megadit.errors import UserError
    from megadit.plan.flops import forward_flops

    config = model_config("dit_step", dry_run)
    backend = "eager" if dry_run else "inductor"
    x, t, cond = inputs_of(config, images, device, torch.bfloat16)
    arms: dict[str, Any] = {}
    ours = [built(config, device, torch.bfloat16) for _ in range(2)]
    for stage in ours[1].stages():
        if stage.is_block:
            stage.compile(fullgraph=True, dynamic=False, backend=backend)

    def warm() -> None:
        with torch.no_grad():
            ours[0](x, t, cond)

    selection = Selection(warm)
    for choice, name, model in (
        ("fused", "fused", ours[0]),
        ("fused", "fused compiled", ours[1]),
        ("torch", "torch", ours[0]),
    ):
        step = train_step(model, functools.partial(model, x, t, cond))
        arms[name] = Arm(step, functools.partial(selection, choice))
    try:
        theirs = [diffusers_dit(config, device, torch.bfloat16, False) for _ in range(2)]
        official = diffusers_dit(config, device, torch.float32, True)
    except (UserError, ImportError) as error:
        deadline.skip("diffusers' arms", f"the package diffusers ({str(error).splitlines()[0][:100]})")
        return arms, forward_flops(config)

    def call(model: Any, pictures: Any) -> Any:
        return model(pictures, timestep=t, class_labels=cond.labels, return_dict=False)[0]

    for block in theirs[1].transformer_blocks:  # as ours: blocks are alike, and compile once
        block.compile(dynamic=False, backend=backend)
    arms["diffusers"] = Arm(train_step(theirs[0], functools.partial(call, theirs[0], x)))
    arms["diffusers compiled"] = Arm(train_step(theirs[1], functools.partial(call, theirs[1], x)))
    wide = train_step(official, functools.partial(call, official, x.float()))

    def in_tf32() -> None:
        with tf32(True):
            wide()

    arms["official way, fp32 and TF32"] = Arm(in_tf32)
    return arms, forward_flops(config)


def model_arms(images: int, device: str, dry_run: bool) -> tuple[dict[str, Any], int]:
    """Forward and backward of MMDiT-18B with recomputed blocks, without an optimizer, whose states would not fit."""
    import torch

    from benchmarks.gpu_timing import Arm
    from megadit.plan.flops import forward_flops

    config = model_config("mmdit_model", dry_run)
    model = built(config, device, torch.bfloat16)
    model.recompute = "full"
    inputs = inputs_of(config, images, device, torch.bfloat16)

    def warm() -> None:
        with torch.no_grad():
            model(*inputs)

    selection = Selection(warm)
    work = forward_backward(functools.partial(model, *inputs), list(model.parameters()))
    return {choice: Arm(work, functools.partial(selection, choice)) for choice in ("fused", "torch")}, forward_flops(
        config
    )


def rows_of(
    part: str, arms: dict[str, Any], flops: int, images: int, watch: Any, bf16_peak: float
) -> list[dict[str, Any]]:
    """A row per arm: time, rates and memory."""
    import torch

    from megadit.plan.flops import peak_flops

    times = watch.medians(arms)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if watch.device == "cuda" else None
    rows = []
    for name, ms in times.items():
        arms[name].prepare()
        rate = 3 * flops * images / ms * 1000
        rows.append(
            {
                "part": part,
                "arm": name,
                "images": images,
                "forward_flops_per_image": flops,
                "ms": ms,
                "images_s": 1000 * images / ms,
                "tflop_s": rate / 1e12,
                "mfu": None if peak is None else rate / peak,
                "of_measured_peak": rate / 1e12 / bf16_peak,
                "peak_gb": watch.peak_gb(arms[name].run),
            }
        )
    return rows


def measure(part: str, images: int, watch: Any, deadline: Any, bf16_peak: float, dry_run: bool) -> list[dict[str, Any]]:
    """The rows of one part; its models are gone afterwards."""
    if part.endswith("block"):
        arms, flops = block_arms(part, images, watch.device, dry_run, deadline)
    elif part == "dit_step":
        arms, flops = step_arms(images, watch.device, dry_run, deadline)
    else:
        arms, flops = model_arms(images, watch.device, dry_run)
    return rows_of(part, arms, flops, images, watch, bf16_peak)


def cells(row: dict[str, Any]) -> list[str]:
    """The row as ``COLUMNS`` show it."""
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    numbers = [f"{row['ms']:.2f}", f"{row['images_s']:.1f}", f"{row['tflop_s']:.1f}", mfu]
    return [
        row["part"],
        row["arm"],
        str(row["images"]),
        *numbers,
        f"{row['of_measured_peak']:.1%}",
        f"{row['peak_gb']:.1f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from benchmarks.gpu_timing import finish, machine_ceilings, start
    from megadit.errors import UserError
    from megadit.tables import aligned

    parts = args.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: {part} is none of {', '.join(PARTS)}")
    watch, deadline = start(args)
    import torch

    from megadit_kernels import select_all

    ceilings = machine_ceilings(watch, deadline, dry_run=args.dry_run)
    rows: list[dict[str, Any]] = []
    for part in parts:
        if not deadline.left(part):
            continue
        images = args.images or (2 if args.dry_run else _IMAGES[part])
        try:
            rows += measure(part, images, watch, deadline, ceilings["bf16_tflop_s"], args.dry_run)
        except torch.cuda.OutOfMemoryError:
            deadline.skip(part, f"more memory than this GPU has, at {images} images; give fewer by --images")
        select_all("auto")
        release(watch.device)
    document = finish(args, "blocks", {"formula": FORMULA, "ceilings": ceilings, "rows": rows}, deadline)
    print(aligned(COLUMNS, map(cells, rows), left=2, rule=True))
    print(FORMULA)
    if document["note"]:
        print(document["note"])
    return 0


def release(device: str) -> None:
    """Give the memory of the part before back."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
