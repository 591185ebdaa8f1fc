"""docs/performance.md holds what benchmarks/block_floor.py counts: formulas are FLOPs that torch counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import block_floor
from benchmarks.block_floor import BEGIN, BLOCKS, END, Block, cost_of, record, tables, traced
from helpers.kernels.interpreter import need_interpreter
from helpers.ranks import ROOT
from megadit.config import ModelConfig, load_config


@pytest.fixture(autouse=True)
def _triton() -> None:
    need_interpreter()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_formula_is_what_torch_counts(block: Block) -> None:
    from megadit.plan.flops import stage_flops

    config = ModelConfig(**load_config(block.file).model.model_dump(exclude_unset=True) | {"depth": 2, "repa": None})
    text = 0 if config.text is None else config.text.max_length
    tokens = (config.input_size // config.patch_size) ** 2
    assert block.flops(tokens, text, config.width) == stage_flops(config)[block.stage]
    names = {"T": tokens, "L": text, "n": config.width}
    spelled = block.formula.replace("²", "**2").replace(" (", "*(").replace(") ", ")*")
    for name in names:
        spelled = spelled.replace(f" {name}", f"*{name}")
    spelled = spelled.replace("+*", "+").replace("(*", "(")
    assert eval(spelled, {}, names) == block.flops(tokens, text, config.width), spelled


def test_the_page_holds_what_is_counted() -> None:
    """python benchmarks/block_floor.py --docs docs/performance.md writes it."""
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == tables([cost_of(block) for block in BLOCKS])
    assert "**Not yet measured on a GPU**" in page


N = 4096  # bytes of an operand below


def bytes_of(function: Callable[..., Any], count: int) -> tuple[int, int, int]:
    """Eager, compiled and floor, in operands, of the function of ``count`` operands without gradients."""
    operands = [torch.empty(2, 16, 32, device="meta", requires_grad=True) for _ in range(count)]
    trace = record(lambda: (function(*operands),), operands)
    return tuple(value // N for value in (trace.eager_bytes(), trace.compiled_bytes(), trace.floor_bytes()))


def test_a_chain_is_one_pass() -> None:
    """x + y, doubled: eagerly 3 and 2 of N bytes, 2 more backward; as a chain 3, and 2."""
    assert bytes_of(lambda x, y: (x + y) * 2.0, 2) == (3 + 2 + 2, 3 + 2, 3 + 2)


def test_a_product_divides_chains_and_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled, multiplied with y^T, doubled: two chains of 2 each; backward each doubling moves 2 again."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(2.0 * x, y.transpose(1, 2)), y) * 2.0

    with_product = bytes_of(function, 2)
    monkeypatch.setattr(block_floor, "is_product", lambda name: False)
    assert with_product[0] < bytes_of(function, 2)[0]
    assert with_product[2] == 4 + 4 + 3  # y's gradient is the sum of two


def test_sums_over_tokens_read_again_beside_sums_over_channels() -> None:
    """A softmax over channels, scaled by a vector: its backward sums over tokens for the vector, and over channels."""

    def trace(over_tokens: bool) -> block_floor.Trace:
        x = torch.empty(2, 16, 32, device="meta", requires_grad=True)
        scale = torch.empty(2, 1, 32, device="meta", requires_grad=True)
        return record(lambda: (torch.softmax(x, -1) * scale,), [x, scale] if over_tokens else [x])

    alone, both = trace(False), trace(True)
    assert alone.compiled_bytes() == alone.floor_bytes()
    assert both.compiled_bytes() - both.floor_bytes() == 2 * N  # the gradient and the softmax, once more


def test_what_is_expanded_or_looked_at_moves_once() -> None:
    x = torch.empty(1, 1, 32, device="meta").expand(2, 16, 32)
    assert list(block_floor.sizes([x, x[..., :16]]).values()) == [32 * 4]


def test_fused_operations_move_less() -> None:
    values = load_config("dit/xl-2-mup.yaml").model.model_dump(exclude_unset=True)
    config = ModelConfig(**values | {"depth": 1})
    plain, fused = (traced(config, 1, choice) for choice in ("torch", "fused"))
    assert fused.eager_bytes() < 0.75 * plain.eager_bytes() and fused.eager_bytes() >= plain.floor_bytes()
    assert len(fused.operations) < len(plain.operations)
