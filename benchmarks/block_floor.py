#!/usr/bin/env python
"""What a Transformer block of each family must compute and move, and what that predicts: no GPU is asked.

One block runs forward and backward on the meta device in bfloat16, and every operation is noted as torch dispatches it.
FLOPs are those of matrix products and attention. Bytes are those of all other operations, each input read once, each
result written once:

  eager      one pass per operation of torch
  compiled   one kernel for every chain of operations between two products, and one more for its sums over tokens
             (gradients of shift, scale, gate and bias), which no generated kernel makes beside sums over channels
  fused      as eager, with the operations of kernels/ as the one kernel each that they are
  floor      every chain between two products in one pass, by torch's operations or by fused ones, whichever moves less

The prediction is time = FLOPs / rate of products + bytes / bandwidth, of nothing that overlaps.

python benchmarks/block_floor.py                                # the tables
python benchmarks/block_floor.py --docs docs/performance.md     # writes them into the page
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 64
BEGIN, END = "<!-- benchmarks/block_floor.py: begin -->", "<!-- end -->"
# TB/s and TFLOP/s: of the A100 by its data sheet, of the H200 as others measured a copy and a square bf16 product.
GPUS = {"A100": (2.0e12, 312e12), "H200": (4.3e12, 790e12)}


@dataclass(frozen=True)
class Block:
    """A block of the configuration file's model, ``stage`` of its stages. ``flops`` is the formula of one image's
    forward pass, by image tokens T, text tokens L and width n.
    """

    name: str
    file: str
    stage: int
    formula: str
    flops: Callable[[int, int, int], int]


BLOCKS = (
    Block("DiT-XL/2", "dit/xl-2-mup.yaml", 1, "24 T n² + 4 T² n + 12 n²",
          lambda t, text, n: 24 * t * n**2 + 4 * t**2 * n + 12 * n**2),
    Block("PixArt-XL/2", "pixart/target-mup.yaml", 1, "28 T n² + 4 L n² + 4 T² n + 4 T L n",
          lambda t, text, n: 28 * t * n**2 + 4 * text * n**2 + 4 * t**2 * n + 4 * t * text * n),
    Block("U-ViT-L/2, first half", "uvit/l-2-mup.yaml", 1, "24 (T+2) n² + 4 (T+2)² n",
          lambda t, text, n: 24 * (t + 2) * n**2 + 4 * (t + 2) ** 2 * n),
    Block("U-ViT-L/2, second half", "uvit/l-2-mup.yaml", 3, "28 (T+2) n² + 4 (T+2)² n",
          lambda t, text, n: 28 * (t + 2) * n**2 + 4 * (t + 2) ** 2 * n),
    Block("MMDiT-18B", "mmdit/18b-mup.yaml", 1, "32 (T+L) n² + 4 (T+L)² n + 24 n²",
          lambda t, text, n: 32 * (t + text) * n**2 + 4 * (t + text) ** 2 * n + 24 * n**2),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--docs", type=Path, help="the page into which the tables are written, between its marks")
    return p


@dataclass
class Operation:
    """One dispatched operation: the storages that it reads and writes, with their bytes.

    ``level``: how many products lie before it, at most; ``over_tokens``: it sums over another dimension than the last.
    """

    reads: dict[int, int]
    writes: dict[int, int]
    level: int
    backward: bool
    product: bool
    over_tokens: bool = False


@dataclass
class Trace:
    """All operations of a pass that move bytes or compute products, and the storages that outlive it."""

    operations: list[Operation] = field(default_factory=list)
    results: set[int] = field(default_factory=set)

    def eager_bytes(self) -> int:
        """One pass per operation."""
        return sum(sum(op.reads.values()) + sum(op.writes.values()) for op in self.operations if not op.product)

    def floor_bytes(self) -> int:
        """One pass per chain: what it reads from outside, and what is needed outside of it."""
        chains = self.chains()
        reads = self._reads(chains)
        inputs = {storage for op in self.operations if op.product for storage in op.reads} | self.results
        total = sum(sum(read.values()) for read in reads)
        for at, chain in enumerate(chains):
            needed = inputs.union(*(read for other, read in enumerate(reads) if other != at))
            written = {storage: size for op in chain for storage, size in op.writes.items()}
            total += sum(size for storage, size in written.items() if storage in needed)
        return total

    def compiled_bytes(self) -> int:
        """The floor, and what sums over tokens read again where their chain sums over channels, or stores, besides."""
        return self.floor_bytes() + sum(self._read_again(chain) for chain in self.chains())

    def chains(self) -> list[list[Operation]]:
        """Connected operations of one direction between the same products."""
        chains: list[list[Operation]] = []
        chain_of: dict[tuple[int, int, bool], int] = {}  # by a storage that the chain wrote, its level and direction
        for op in self.operations:
            if op.product:
                continue
            keys = {(storage, op.level, op.backward) for storage in op.reads}
            joined = sorted({chain_of[key] for key in keys if key in chain_of})
            home = joined[0] if joined else len(chains)
            if not joined:
                chains.append([])
            for other in joined[1:]:
                chains[home] += chains[other]
                chains[other] = []
                chain_of = {key: home if at == other else at for key, at in chain_of.items()}
            chains[home].append(op)
            chain_of |= {(storage, op.level, op.backward): home for storage in op.writes}
        return [chain for chain in chains if chain]

    def _reads(self, chains: list[list[Operation]]) -> list[dict[int, int]]:
        """What each chain reads from outside; a backward chain computes again what is cheaper so than kept."""
        writer = {s: op for op in self.operations if not (op.backward or op.product) for s in op.writes}
        home = {storage: at for at, chain in enumerate(chains) for op in chain for storage in op.writes}
        kept = set(self.results)  # of the forward pass, what is written whether the backward pass reads it or not
        for op in self.operations:
            if op.product:
                kept |= op.reads.keys()
        for at, chain in enumerate(chains):
            if not chain[0].backward:
                kept |= {storage for op in chain for storage in op.reads if home.get(storage, at) != at}
        reads = []
        for at, chain in enumerate(chains):
            read = {s: size for op in chain for s, size in op.reads.items() if home.get(s) != at}
            for storage in sorted(read, key=read.__getitem__, reverse=True) if chain[0].backward else ():
                if storage in writer and storage in read:
                    sources = _sources(writer[storage], writer, kept)
                    more = sum(size for source, size in sources.items() if source not in read)
                    if more < read[storage] * (1 if storage in kept else 2):
                        del read[storage]
                        read |= sources
            reads.append(read)
        return reads

    @staticmethod
    def _read_again(chain: list[Operation]) -> int:
        sums = [op for op in chain if op.over_tokens]
        if not sums or len(sums) == len(chain):
            return 0
        writer = {storage: op for op in chain for storage in op.writes}
        outside: dict[int, int] = {}
        seen: set[int] = set()
        open_ends = list(sums)
        while open_ends:
            op = open_ends.pop()
            if id(op) in seen:
                continue
            seen.add(id(op))
            for storage, size in op.reads.items():
                if storage in writer and writer[storage] is not op:
                    open_ends.append(writer[storage])
                else:
                    outside[storage] = size
        return sum(outside.values())


def _sources(op: Operation, writer: dict[int, Operation], kept: set[int]) -> dict[int, int]:
    """The storages, with their bytes, from which the result of ``op`` can be computed: kept ones, and no others."""
    sources: dict[int, int] = {}
    open_ends, seen = [op], set()
    while open_ends:
        op = open_ends.pop()
        if id(op) in seen:  # one that changes a tensor in place reads what it writes
            continue
        seen.add(id(op))
        for storage, size in op.reads.items():
            if storage in writer and storage not in kept:
                open_ends.append(writer[storage])
            else:
                sources[storage] = size
    return sources


def traced(config: Any, stage: int, choice: str) -> Trace:
    """Forward and backward of the model's stage on ``IMAGES`` images, its operations by ``choice``: torch or fused."""
    import torch

    from megadit.models import build_model
    from megadit.mup.example import example_conditioning

    model = build_model(config, device="meta").to(torch.bfloat16)
    with selected(choice):
        x = torch.empty(IMAGES, config.in_channels, config.input_size, config.input_size, device="meta")
        one = example_conditioning(config, [0]).to("meta")
        parts = {"labels": one.labels, "text": one.text, "pooled": one.pooled}  # texts of full length, without a mask
        cond = type(one)(**{key: None if part is None else part.expand(IMAGES, *part.shape[1:]).contiguous()
                            for key, part in parts.items()})  # fmt: skip
        state = model.packed_inputs(x, torch.empty(IMAGES, device="meta"), cond)
        with torch.no_grad():
            for before in model.stages()[:stage]:
                state = before(state)
        block = model.stages()[stage]
        inputs = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in state)
        leaves = [*block.parameters(), *(part for part in inputs if part.requires_grad)]
        return record(lambda: block(inputs), leaves)


def record(forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> Trace:
    """The trace of ``forward`` and of the gradients of ``leaves``."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    trace = Trace()
    alive: list[Any] = []  # a storage that is freed gives its number to another
    level: dict[int, int] = {}

    def tensors(value: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.numel()]

    class Record(TorchDispatchMode):
        backward = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            alive.extend(tensors((args, result)))
            reads, writes = sizes(tensors((args, kwargs))), sizes(tensors(result))
            name = func._schema.name
            if not writes.keys() - reads.keys() and not name.endswith("_"):
                return result  # a view
            before = max((level.get(storage, 0) for storage in reads), default=0)
            product = is_product(name)
            level.update({storage: before + product for storage in writes})
            if not name.startswith(("aten::empty", "aten::new_empty", "aten::new_zeros", "aten::zeros")):
                sums = name == "aten::sum" and len(args) > 1 and is_over_tokens(args[0].dim(), args[1])
                trace.operations.append(Operation(reads, writes, before, self.backward, product, sums))
            return result

    with Record() as mode:
        outputs = forward()
        given = [torch.empty_like(part) for part in outputs if part.requires_grad]
        mode.backward = True
        grads = torch.autograd.grad([part for part in outputs if part.requires_grad], leaves, given, allow_unused=True)
    trace.results = set(sizes(tensors((outputs, grads))))
    return trace


def sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage of what the tensors show of it; what is expanded counts once."""
    size_of: dict[int, int] = {}
    for tensor in tensors:
        count = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= length if stride else 1
        storage = tensor.untyped_storage()._cdata
        size_of[storage] = min(size_of.get(storage, 0) + count, tensor.untyped_storage().nbytes())
    return size_of


def is_over_tokens(dimensions: int, summed: Iterable[int]) -> bool:
    """Whether a sum goes over another dimension than the last."""
    return any(dim % dimensions != dimensions - 1 for dim in summed)


def is_product(name: str) -> bool:
    """Matrix products and attention, whose time is that of their FLOPs."""
    products = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward")
    return name.split("::")[1] in products or "attention" in name


@contextmanager
def selected(choice: str) -> Iterator[None]:
    """All operations by ``choice`` and as operators that dispatch can see; attention as one operator as well."""
    import torch

    from megadit_kernels import select_all

    attention, compiling = torch.nn.functional.scaled_dot_product_attention, torch.compiler.is_compiling
    select_all(choice)
    if choice == "fused":
        torch.compiler.is_compiling = lambda: True
    torch.nn.functional.scaled_dot_product_attention = one_operator()
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention, torch.compiler.is_compiling = attention, compiling
        select_all("auto")


@functools.cache
def one_operator() -> Callable[..., Tensor]:
    """Attention of shapes alone, as flash attention lays its result out: on meta, torch's own writes the scores."""
    import torch

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [part.new_empty(part.shape) for part in (q, k, v)]

    def operator(name: str, function: Callable[..., Any], schema: str) -> Any:
        made = torch.library.custom_op(f"block_floor::{name}", function, mutates_args=(), schema=schema)
        made.register_fake(function)
        return made

    attention = operator("attention", forward, "(Tensor q, Tensor k, Tensor v) -> Tensor")
    gradients = operator("attention_backward", backward, "(Tensor dy, Tensor q, Tensor k, Tensor v) -> Tensor[]")
    attention.register_autograd(
        lambda ctx, dy: tuple(gradients(dy, *ctx.saved_tensors)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return lambda query, key, value, attn_mask=None, **_: attention(query, key, value)


@dataclass(frozen=True)
class Cost:
    """Of one image in a block, forward and backward together; ``flops`` is that of the forward pass."""

    block: Block
    tokens: int
    text: int
    width: int
    flops: int
    eager: float
    compiled: float
    fused: float
    floor: float

    def seconds(self, gpu: str, moved: float) -> float:
        """Predicted, of forward and backward."""
        bandwidth, rate = GPUS[gpu]
        return 3 * self.flops / rate + moved / bandwidth


def cost_of(block: Block) -> Cost:
    """Counted."""
    from megadit.config import ModelConfig, load_config
    from megadit.plan.flops import stage_flops

    values = load_config(block.file).model.model_dump(exclude_unset=True)
    # Attention in bfloat16 in every family, and of U-ViT one block of each kind.
    config = ModelConfig(**values | {"depth": 2, "repa": None, "attention_precision": "auto"})
    plain, fused = traced(config, block.stage, "torch"), traced(config, block.stage, "fused")
    moved = (
        plain.eager_bytes(),
        plain.compiled_bytes(),
        fused.eager_bytes(),
        min(plain.floor_bytes(), fused.floor_bytes()),
    )
    tokens = (config.input_size // config.patch_size) ** 2
    text = 0 if config.text is None else config.text.max_length
    flops = stage_flops(config)[block.stage]
    return Cost(block, tokens, text, config.width, flops, *(part / IMAGES for part in moved))


def tables(costs: Sequence[Cost]) -> str:
    """The page's two tables, in markdown."""
    from benchmarks.gpu_page import table

    def mb(moved: float) -> str:
        return f"{moved / 1e6:.1f}"

    counted = table(
        ("block", "n, T, L", "forward FLOPs", "GFLOP", "floor, MB", "eager", "compiled", "fused"),
        (
            [c.block.name, f"{c.width}, {c.tokens}, {c.text or '-'}", c.block.formula, f"{c.flops / 1e9:.2f}",
             mb(c.floor), mb(c.eager), mb(c.compiled), mb(c.fused)]
            for c in costs
        ),
    )  # fmt: skip
    ways = ("products", "eager", "compiled", "fused", "eager / fused")
    predicted = table(
        ("block", *(f"{gpu}: {how}" for gpu in GPUS for how in ways)),
        (
            [c.block.name]
            + [
                text
                for gpu in GPUS
                for times in [[c.seconds(gpu, moved) * 1e6 for moved in (0.0, c.eager, c.compiled, c.fused)]]
                for text in (*(f"{value:.1f}" for value in times), f"{times[1] / times[3]:.2f}")
            ]
            for c in costs
        ),
    )
    first = "Counted, of one image; bytes of forward and backward together:"
    second = "Predicted, µs per image and block, forward and backward; products are the FLOPs alone:"
    return f"{first}\n\n{counted}\n\n{second}\n\n{predicted}"


def written(page: str, text: str) -> str:
    """The page with ``text`` between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print, or write."""
    args = parser().parse_args(argv)
    text = tables([cost_of(block) for block in BLOCKS])
    if args.docs:
        args.docs.write_text(written(args.docs.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
