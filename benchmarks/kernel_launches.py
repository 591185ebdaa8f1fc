"""Count the kernels that a training step launches, by torch and fused, per block and besides, without a GPU.

A model of each family takes a step on the meta device: every operation of torch that the dispatcher sees and that is no
view and no allocation is a launch, and so is every Triton kernel that a launcher starts. Both ways call what
``megadit_kernels.OPS_OF_KEY`` lists, so a new fused operation is counted by itself. Needs Triton, which must not be
told to interpret (TRITON_INTERPRET).

Attention counts one forward and one backward, whatever runs it; a matrix product counts one. Copies from the host, the
optimizer and communication are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if TYPE_CHECKING:
    import torch

# Of each family the largest model of the paper, and how many blocks are counted twice to find what one takes: U-ViT's
# come in pairs, of which one has the long skip.
FAMILIES = {
    "dit": ("dit/xl-2-mup.yaml", 1),
    "pixart": ("pixart/target-mup.yaml", 1),
    "uvit": ("uvit/l-2-mup.yaml", 2),
    "mmdit": ("mmdit/18b-mup.yaml", 1),
}
WAYS = ("torch", "fused")
NO_LAUNCH = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_local_scalar_dense", "resize_")
_MIDDLE = 4  # blocks of the smaller of two models that are compared


@dataclass(frozen=True)
class Launches:
    """Kernels of a training step. ``block``: of one block more; ``rest``: of a step without any block, noise and loss
    among them; ``step``: of the whole model, of ``depth`` blocks."""

    family: str
    way: str
    block_forward: float
    block_backward: float
    rest_forward: float
    rest_backward: float
    depth: int

    @property
    def step(self) -> int:
        """Of a step of the model at its own depth."""
        per_block = self.block_forward + self.block_backward
        return round(self.rest_forward + self.rest_backward + self.depth * per_block)


class Counter:
    """Launches, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def counting() -> Iterator[Counter]:
    """Inside, operations on the meta device are counted, and Triton's kernels are counted instead of launched."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from triton.runtime.jit import JITFunction

    counter = Counter()

    def on_device(values: Any) -> bool:
        return any(isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" for leaf in tree_leaves(values))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            from_host = name in ("_to_copy", "copy_") and not on_device(args[-1:])
            if on_device(result) and not func.is_view and not name.startswith(NO_LAUNCH) and not from_host:
                counter.names.append(name)
            return result

    def launched(function: Any, *arguments: Any, **options: Any) -> None:
        counter.names.append(f"triton {function.__name__}")

    run, modules = JITFunction.run, _modules_that_launch()
    JITFunction.run = launched
    originals = {module: module.launches for module in modules}
    for module in modules:
        module.launches = lambda x: x.numel() > 0
    try:
        with Mode():
            yield counter
    finally:
        JITFunction.run = run
        for module, launches in originals.items():
            module.launches = launches


def _modules_that_launch() -> list[Any]:
    """The modules of fused operations, which ask ``launches`` whether there is anything to do."""
    import importlib
    import pkgutil

    import megadit_kernels
    import megadit_kernels.operators

    imported = []
    for entry in pkgutil.walk_packages(megadit_kernels.__path__, "megadit_kernels."):
        if entry.name.endswith(".fused"):
            imported.append(importlib.import_module(entry.name))
    return [module for module in imported if hasattr(module, "launches")]


@contextmanager
def whole_attention() -> Iterator[None]:
    """Inside, attention is one operation forward and one backward, laid out as flash attention lays it out.

    (B, heads, T, d), with heads and channels of a token side by side.
    """
    import torch

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        return _Attention.apply(query, key, value)

    class _Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            ctx.save_for_backward(query, key, value)
            batch, heads, tokens, _ = query.shape
            return query.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            sizes = [part.numel() for part in ctx.saved_tensors]
            parts = grad.new_zeros(sum(sizes)).split(sizes)
            shapes = [part.transpose(1, 2).shape for part in ctx.saved_tensors]
            return tuple(part.view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def step_launches(path: str, depth: int, dtype: torch.dtype, way: str) -> tuple[Counter, Counter]:
    """Launches of noise, forward pass and loss, and of the backward pass, of a model with ``depth`` blocks."""
    import torch

    from megadit.conditioning import null_label
    from megadit.config import ModelConfig, load_config
    from megadit.diffusion import build_objective
    from megadit.models import build_model
    from megadit.mup.example import example_conditioning
    from megadit_kernels import select_all

    run = load_config(path)
    settings = {**run.model.model_dump(exclude_unset=True), "depth": depth, "repa": None}
    model_config = ModelConfig(**settings)
    model = build_model(model_config, device="meta").to(dtype)
    model.residual_across_blocks = way == "fused"  # as kernels.residual_across_blocks auto has it
    objective = build_objective(run.objective, learn_sigma=model_config.learn_sigma, null=null_label(0))
    x0 = torch.empty(2, model_config.in_channels, model_config.input_size, model_config.input_size, device="meta")
    cond = example_conditioning(model_config, range(2)).to("meta")
    select_all(way)
    try:
        objective.prepare(x0, cond, range(2), 0, drop=False)  # tables of the schedule go to the device once
        with whole_attention(), counting() as forward:
            noisy = objective.prepare(x0, cond, range(2), 0, drop=False)
            loss = objective.loss(model(noisy.x, noisy.t, noisy.cond), noisy).total.mean()
        with whole_attention(), counting() as backward:
            loss.backward()
    finally:
        select_all("auto")
    return forward, backward


def measure(families: tuple[str, ...]) -> list[Launches]:
    """A row per family and way."""
    import torch

    from megadit.config import load_config

    rows = []
    for family in families:
        path, unit = FAMILIES[family]
        for way in WAYS:
            small, large = (
                [len(counter) for counter in step_launches(path, depth, torch.bfloat16, way)]
                for depth in (_MIDDLE, _MIDDLE + unit)
            )
            block = [(more - less) / unit for more, less in zip(large, small, strict=True)]
            rest = [less - _MIDDLE * each for less, each in zip(small, block, strict=True)]
            depth = load_config(path).model.depth
            assert depth is not None
            rows.append(Launches(family, way, *block, *rest, depth))
    return rows


def table(rows: list[Launches]) -> str:
    """The rows in Markdown, torch and fused side by side."""
    lines = [
        "| family | a block by torch | fused | the rest by torch | fused | a step by torch | fused |",
        "|---|---|---|---|---|---|---|",
    ]
    by_family: dict[str, dict[str, Launches]] = {}
    for row in rows:
        by_family.setdefault(row.family, {})[row.way] = row
    for family, ways in by_family.items():
        pairs = [ways[way] for way in WAYS]
        blocks = [f"{row.block_forward:g} + {row.block_backward:g}" for row in pairs]
        rests = [f"{row.rest_forward:g} + {row.rest_backward:g}" for row in pairs]
        steps = [f"{row.step:,}" for row in pairs]
        lines.append(f"| {family} | {' | '.join([*blocks, *rests, *steps])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="by commas (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--names", action="store_true", help="list what is launched in a model of four blocks instead")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    families = tuple(options.families.split(","))
    if options.names:
        print_names(families)
        return 0
    rows = measure(families)
    if options.out:
        lines = ",\n".join(json.dumps({**asdict(row), "step": row.step}) for row in rows)
        options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(table(rows))
    return 0


def print_names(families: tuple[str, ...]) -> None:
    """How often each operation and kernel is launched."""
    from collections import Counter as Tally

    import torch

    for family in families:
        for way in WAYS:
            for name, counter in zip(
                ("forward", "backward"), step_launches(FAMILIES[family][0], _MIDDLE, torch.bfloat16, way), strict=True
            ):
                print(f"{family} {way} {name}: " + ", ".join(f"{n} {k}" for k, n in Tally(counter.names).most_common()))


if __name__ == "__main__":
    sys.exit(main())
