"""``kernels.residual_across_blocks``: a block's last residual is added within the next block's first norm.

On torch that changes no bit of outputs and gradients; on the fused kernels it saves launches, counted here for
docs/kernels.md, and memory stays what it was unless blocks are recomputed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compiler import WHOLE, compiling, graphs
from helpers.kernels.interpreter import counted, need_interpreter
from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from megadit.models import build_model
from megadit.models.chunk import build_chunk
from megadit.models.stages import Stage, StagedModel, StageIO
from megadit.plan.memory import stage_costs
from megadit_kernels import OPS_OF_KEY

MODELS: dict[str, tuple[Any, Any]] = {
    "dit": (tiny_dit, dit_inputs),
    "pixart": (tiny_pixart, pixart_inputs),
    "mmdit": (tiny_mmdit, mmdit_inputs),
    "uvit": (functools.partial(tiny_uvit, "class"), uvit_inputs),
    "uvit, masked text": (functools.partial(tiny_uvit, "text"), uvit_inputs),
}
FAMILIES = ("dit", "pixart", "mmdit", "uvit")
REPA = {"block": 2, "feature_dim": 5, "hidden": 7}


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    yield
    for op in OPS_OF_KEY["norm_modulate"]:
        op.select("auto")


def drawn(config: Any, across: bool) -> StagedModel:
    """No gate stays closed, no readout at zero."""
    model = build_model(config)
    model.residual_across_blocks = across
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def outputs_and_gradients(config: Any, inputs: Any, across: bool, recompute: Any, **options: Any) -> list[Tensor]:
    model = drawn(config, across)
    model.recompute = recompute
    outputs = model(*inputs, **options)
    parts = [outputs] if isinstance(outputs, Tensor) else [outputs[0], *outputs[1]]
    torch.stack([part.square().mean() for part in parts]).sum().backward()
    return [*(part.detach() for part in parts), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", list(MODELS))
def test_on_torch_it_changes_no_bit(family: str, recompute: str) -> None:
    make, draw = MODELS[family]
    config = make(depth=4)
    inputs = draw(config)
    for options in ({}, {"taps": (2, 4)}):
        without = outputs_and_gradients(config, inputs, False, recompute, **options)
        across = outputs_and_gradients(config, inputs, True, recompute, **options)
        assert len(without) == len(across) and all(torch.equal(a, b) for a, b in zip(without, across, strict=True))


def handed_over(model: StagedModel, inputs: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[bool]:
    """Of each block in order, whether it left its last residual to the next stage."""
    calls: list[bool] = []
    forward = Stage.forward

    def noted(self: Stage, tensors: StageIO, leave_pending: bool = False) -> StageIO:
        if self.is_block:
            calls.append(leave_pending)
        return forward(self, tensors, leave_pending)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "forward", noted)
        model(*inputs, **options)
    return calls


def test_whatever_reads_tokens_between_blocks_gets_them_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """REPA, taps and U-ViT's joined skips; the last block leaves its residual to the final norm."""
    config = tiny_dit(depth=4, repa=REPA)
    model, inputs = drawn(config, True), dit_inputs(config)
    assert handed_over(model, inputs, monkeypatch) == [True] * 4
    assert handed_over(model, inputs, monkeypatch, project=True) == [True, False, True, True]
    assert handed_over(model, inputs, monkeypatch, taps=(1, 4)) == [False, True, True, False]
    assert handed_over(drawn(config, False), inputs, monkeypatch) == [False] * 4
    config = tiny_uvit(depth=4)  # of 5 blocks the last two join a skip before their first norm
    assert handed_over(drawn(config, True), uvit_inputs(config), monkeypatch) == [True, True, False, False, True]


@pytest.mark.parametrize("family", list(MODELS))
def test_what_travels_between_ranks_stays_as_it_is(family: str) -> None:
    """Shapes and bits of what chunks of two blocks send, with the projection of REPA beside it."""
    make, draw = MODELS[family]
    config = make(depth=4, repa=REPA)
    stages = config.blocks + 2
    cuts = (0, 3, stages)
    sent = []
    for across in (False, True):
        chunks = [build_chunk(config, cuts, index) for index in range(len(cuts) - 1)]
        stage_io: Any = chunks[0].model.packed_inputs(*draw(config))
        for chunk in chunks:
            chunk.model.residual_across_blocks, chunk.project = across, True
            stage_io = chunk(stage_io)
            sent.append(stage_io)
    for without, with_it in zip(sent[:2], sent[2:], strict=True):
        assert len(without) == len(with_it) and all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize("family", list(MODELS))
def test_a_state_with_a_pending_residual_is_told_from_one_without(family: str) -> None:
    """Between every two stages: packing and unpacking gives the same state, completed or not."""
    make, draw = MODELS[family]
    config = make(depth=4)
    model = drawn(config, True)
    stages = model.stages()
    stage_io = model.packed_inputs(*draw(config))
    left = 0
    for stage, following in itertools.pairwise(stages):
        state = stage.run(stage.takes.unpack(stage_io))
        for kind in (state, state.complete()):
            again = following.takes.unpack(kind.pack())
            assert all(a is b or torch.equal(a, b) for a, b in zip(again.pack(), kind.pack(), strict=True))
            assert len(getattr(again, "pending", ())) == len(getattr(kind, "pending", ()))
        left += bool(getattr(state, "pending", ()))
        stage_io = state.complete().pack()
    assert left == config.blocks


def test_compiled_blocks_hand_over_without_a_break_in_the_graph() -> None:
    """As train.compile compiles them, each on its own."""
    config = tiny_dit(depth=3)
    inputs = dit_inputs(config)
    expected = outputs_and_gradients(config, inputs, False, "none")
    model = drawn(config, True)
    with compiling():
        model.compile_blocks(**WHOLE)
        out = model(*inputs)
        out.square().mean().backward()
        assert graphs() == 2  # the first block, which takes nothing pending, and the others
    for ours, theirs in zip((out.detach(), *(p.grad for p in model.parameters())), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


class AddedStreams(TorchDispatchMode):
    """Counts torch's sums of whole streams (B, T, n): what autograd adds where two gradients of one tensor meet."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_sum = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.count += is_sum and isinstance(out, Tensor) and out.dim() == 3 and out.shape[-1] == 288
        return out


def moved(family: str, depth: int, across: bool) -> list[float]:
    """Launches and bytes of the norm's kernels forward, and backward, and autograd's sums backward."""
    make, draw = MODELS[family]
    config = make(depth=depth, width=288, heads=4, input_size=16)
    model = drawn(config, across).bfloat16()
    x, *rest = draw(config, 1)
    with counted() as forward:
        out = model(x.bfloat16(), *rest)
    with AddedStreams() as sums, counted() as backward:
        out.sum().backward()
    return [
        len(forward), sum(launch.bytes for launch in forward),
        len(backward), sum(launch.bytes for launch in backward), sums.count,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "dit")]
)
def test_launches_and_bytes_per_block_are_those_of_the_documents(family: str, root: Path) -> None:
    """A block more, of 64 tokens of 288 channels; of U-ViT the mean of one before and one behind the middle."""
    need_interpreter()
    for op in OPS_OF_KEY["norm_modulate"]:
        op.select("fused")
    text = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    cells = []
    for across in (False, True):
        less, more = (moved(family, depth, across) for depth in (2, 4))
        launches, nbytes, back, back_bytes, sums = ((b - a) / 2 for a, b in zip(less, more, strict=True))
        cells.append(f"{launches:g} + {back:g} + {sums:g} | {nbytes / 1000:.0f} + {back_bytes / 1000:.0f}")
    label = {"dit": "DiT", "pixart": "PixArt-α", "mmdit": "MMDiT", "uvit": "U-ViT"}[family]
    row = f"| {label} | {' | '.join(cells)} |"
    assert row in text, row


@pytest.mark.parametrize("family", FAMILIES)
def test_it_costs_memory_where_blocks_are_recomputed_and_only_there(family: str) -> None:
    """What is kept for the backward pass, as the plan counts it; why auto leaves recomputed blocks alone."""
    make, _ = MODELS[family]
    config = make(depth=4)
    kept: dict[str, list[int]] = {}
    for recompute in ("none", "selective", "full"):
        for across in (False, True):
            [(_, cost)] = stage_costs(
                config, (0, config.blocks + 2), 4, torch.bfloat16, recompute, residual_across_blocks=across
            )
            kept.setdefault(recompute, []).append(cost.saved_bytes)
    assert kept["none"][1] == pytest.approx(kept["none"][0], rel=0.002)
    assert kept["selective"][1] <= 1.06 * kept["selective"][0]
    assert kept["full"][1] > 1.15 * kept["full"][0]


def test_a_block_that_forgets_what_it_was_left_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit.models.layers import norm

    config = tiny_dit(depth=3)
    inputs = dit_inputs(config)
    expected = drawn(config, False)(*inputs)
    right = norm.ModulatedNorm.of_stream

    def forgets(self: Any, x: Tensor, pending: Any, *rest: Any, **rows: Any) -> Any:
        return right(self, x, (), *rest, **rows)

    monkeypatch.setattr(norm.ModulatedNorm, "of_stream", forgets)
    assert torch.equal(drawn(config, False)(*inputs), expected)
    assert not torch.allclose(drawn(config, True)(*inputs), expected, rtol=1e-3)
