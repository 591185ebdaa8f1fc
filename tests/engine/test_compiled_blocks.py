"""Compiled blocks: whole graphs in every layout, with the losses, gradients and weights of blocks that are not.

torch's debugging back end traces, differentiates and partitions as for a GPU, and runs the graphs by eager kernels.
"""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compiler import WHOLE, compiling, graphs, import_compiler
from helpers.kernels.flash import BACKENDS, CALLS, flash_on_cpu
from helpers.kernels.interpreter import counted, need_interpreter
from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config.schema.kernels import KernelConfig
from megadit.engine.kernels import select_kernels
from megadit.models import build_model
from megadit.parallel.tensor import TensorLayout
from megadit_kernels import FUSED_KEYS, OPS_OF_KEY

FAMILIES = {
    "dit": (tiny_dit, dit_inputs),
    "mmdit": (tiny_mmdit, functools.partial(mmdit_inputs, lengths=[5, 0, 3])),
    "pixart": (tiny_pixart, pixart_inputs),
    "uvit": (tiny_uvit, uvit_inputs),
}
KINDS = {"dit": 1, "mmdit": 2, "pixart": 2, "uvit": 3}  # of blocks, each compiled once, at every depth
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # the compiler sums gradients of a tensor's uses in another order


def steps(model: torch.nn.Module, inputs: Any, count: int = 3) -> list[Tensor]:
    """Of some steps of gradient descent: every loss and gradient, then the weights."""
    values = []
    for _ in range(count):
        loss = model(*inputs).square().mean()
        model.zero_grad()
        loss.backward()
        values += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return [*values, *(p.detach().clone() for p in model.parameters())]


def both(family: str, recompute: str, layout: TensorLayout | None = None, count: int = 3, **changes: Any) -> int:
    """Hold the compiled blocks of a tiny model against its eager ones; how many graphs there are."""
    make, draw = FAMILIES[family]
    config = make(**changes)
    inputs = draw(config)
    model = build_model(config, layout)
    randomize(model)
    model.recompute = recompute
    expected = steps(model, inputs, count)
    randomize(model)
    for op in (op for ops in OPS_OF_KEY.values() for op in ops):
        op.select(op.choice)  # forgets what runs on the CPU, as at the start of a run
    with compiling():
        model.compile_blocks(**WHOLE)
        results = steps(model, inputs, count)
        number = graphs()
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    return number


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("dit", "selective"),
        ("mmdit", "full"),
        *(
            pytest.param(family, recompute, marks=pytest.mark.slow)
            for family in FAMILIES
            for recompute in ("none", "selective", "full")
            if (family, recompute) not in (("dit", "selective"), ("mmdit", "full"))
        ),
    ],
)
def test_compiled_blocks_compute_and_recompute_the_same(family: str, recompute: str) -> None:
    assert both(family, recompute) == KINDS[family]


def rank_with_both(family: str, recompute: str, sequence: bool) -> int:
    import torch.distributed as dist

    group = dist.new_group(list(range(dist.get_world_size())))
    return both(family, recompute, TensorLayout(dist.get_world_size(), dist.get_rank(), sequence, group))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "recompute", "sequence"),
    [
        ("dit", "selective", True),
        *(
            pytest.param(family, recompute, sequence, marks=pytest.mark.slow)
            for family in FAMILIES
            for recompute, sequence in (("selective", True), ("selective", False), ("none", True), ("full", True))
            if (family, recompute, sequence) != ("dit", "selective", True)
        ),
    ],
)
def test_collectives_of_tensor_parallel_ranks_are_part_of_the_graphs(
    family: str, recompute: str, sequence: bool
) -> None:
    import_compiler()
    counts = run_ranks(2, rank_with_both, family, recompute, sequence)
    assert counts == [KINDS[family]] * 2


def compiled_training(config: Any, folder: str, ds: dict[str, Any] | None) -> dict[str, Any]:
    """``train_rank`` by whole graphs of the debugging back end."""
    if not config.train.compile:
        return train_rank(config, folder, None, None, ds)
    with compiling():
        torch.compile = functools.partial(torch.compile, **WHOLE)
        return train_rank(config, folder, None, None, ds) | {"graphs": graphs()}


LAYOUTS = {
    "pipeline": (2, {"pipeline": 2, "zero_stage": 1}, "none"),
    "pipeline, selective": (2, {"pipeline": 2, "zero_stage": 1}, "selective"),
    "ZeRO-2, full": (2, {"zero_stage": 2}, "full"),
    "ZeRO-3": (2, {"zero_stage": 3}, "none"),
    "ZeRO-3, selective": (2, {"zero_stage": 3}, "selective"),
    "ZeRO-3, full": (2, {"zero_stage": 3}, "full"),
    "tensor, sequence, ZeRO-3, selective": (4, {"tensor": 2, "sequence": True, "zero_stage": 3}, "selective"),
    "tensor, pipeline": (4, {"tensor": 2, "pipeline": 2, "zero_stage": 1}, "selective"),
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_compiled_run_trains_what_a_plain_one_does(tmp_path: Any, name: str) -> None:
    """Losses, gradient norms, weights and moments through DeepSpeed; under ZeRO-3 no parameter stays gathered.

    Compiled blocks leave their last residual to the next, the others do not.
    """
    import_compiler()
    world, parallel, recompute = LAYOUTS[name]
    ds = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} if "ZeRO-3" in name else None
    runs = []
    for compiled in (False, True):
        train = {"micro_batch": 4, "steps": 3, "activation_checkpointing": recompute, "compile": compiled}
        config = small_config(
            model={"width": 64, "heads": 4, "qk_norm": "rms"},
            parallel=parallel,
            kernels={"residual_across_blocks": compiled},
            train=train,
        )
        runs.append(run_ranks(world, compiled_training, config, str(tmp_path / str(compiled)), ds))
    plain, compiled_ranks = runs
    for theirs, ours in zip(plain, compiled_ranks, strict=True):
        assert ours["graphs"] >= 1
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    for kind in ("pieces", "exp_avg", "exp_avg_sq"):
        expected, merged = merge_weights(plain, kind), merge_weights(compiled_ranks, kind)
        assert merged.keys() == expected.keys()
        for tensor, values in expected.items():
            torch.testing.assert_close(merged[tensor], values, rtol=1e-4, atol=1e-6, msg=f"{kind} of {tensor}")


@pytest.mark.parametrize(
    "family", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mmdit", "pixart"))]
)
def test_fused_kernels_are_operators_of_the_graphs(family: str) -> None:
    """In Triton's interpreter, each block one graph, recomputed selectively."""
    need_interpreter()
    select_kernels(KernelConfig(**dict.fromkeys(FUSED_KEYS, "fused")))
    try:
        with counted() as launches:
            assert both(family, "selective", count=1, mlp="swiglu", qk_norm="rms") == KINDS[family]
    finally:
        select_kernels(KernelConfig())
    assert launches


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("mmdit", "flash-attn 2"),
        *(
            pytest.param(family, backend, marks=pytest.mark.slow)
            for family in ("mmdit", "pixart")
            for backend in BACKENDS
            if (family, backend) != ("mmdit", "flash-attn 2")
        ),
    ],
)
def test_attention_by_lengths_is_part_of_the_graphs(family: str, backend: str) -> None:
    """By the operators of torch and of flash-attn, whose results selective recomputation keeps."""
    with flash_on_cpu(backend):
        assert both(family, "selective", count=1) == KINDS[family]
        kernels = [kernel for kernel, _ in CALLS]
    assert kernels.count("forward") == kernels.count("backward") > 0


def test_a_compiled_model_can_be_copied_and_evaluated() -> None:
    config = tiny_dit()
    model = build_model(config)
    randomize(model)
    inputs = dit_inputs(config)
    expected = model(*inputs).detach()
    model.recompute = "selective"
    with compiling(), torch.no_grad():
        model.compile_blocks(**WHOLE)
        assert torch.equal(model(*inputs), expected)
        output, taps = model(*inputs, taps=(1, 2))
    assert torch.equal(output, expected) and len(taps) == 2
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == build_model(config).state_dict().keys()
