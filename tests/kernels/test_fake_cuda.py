"""Every fused operation and the whole model of each family on fake CUDA tensors: as on a GPU, without one.

Dispatch takes the fused implementation of each operation, results have the shapes, strides and dtypes that torch gives
on the CPU, torch.compile makes one graph of a block, and the operator of each backward pass does as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.kernel_cases import CASES, Draw, Shape, detached, fused_ops
from helpers.compiler import compiling
from helpers.kernels.fake_cuda import fake_cuda, like, to_fake_cuda
from helpers.kernels.interpreter import need_interpreter
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig, load_config
from megadit.models import build_model
from megadit.mup.example import example_conditioning
from megadit.registry import load_object
from megadit_kernels import OPS, Op

# Attention has no kernel of this package: tests/kernels/test_attention.py.
FUSED = fused_ops()
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _triton() -> None:
    need_interpreter()


def layout(value: Any) -> Any:
    """Shape, strides and dtype of every tensor in ``value``."""
    return tree_map(lambda leaf: (tuple(leaf.shape), leaf.stride(), leaf.dtype), value)


def result_layout(name: str, result: Any) -> Any:
    """``layout`` of an operation's result, without strides where the reference gives views of what it was given."""
    views = name in ("qk_norm", "attention")
    return tree_map(lambda leaf: (leaf.shape, leaf.dtype), result) if views else layout(result)


def of_tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def test_every_operation_has_a_case() -> None:
    """Whoever adds an operation adds its operands to benchmarks/kernel_cases.py; what stands here covers it then."""
    assert set(CASES) == set(OPS) and set(FUSED) <= set(OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(FUSED))
def test_an_operation_takes_its_kernel(name: str, dtype: torch.dtype) -> None:
    case, op = CASES[name], FUSED[name]
    expected = layout(case.results(op.reference, case.leaves(Shape(2, 6, 144), Draw(dtype, "cpu").tensors())))
    with fake_cuda():
        leaves = case.leaves(Shape(2, 6, 144), Draw(dtype, "cuda", values=False).tensors())
        assert op.backend_on("cuda") == "fused"
        results = case.results(op, leaves)
        assert all(isinstance(result, FakeTensor) and result.device.type == "cuda" for result in results)
        assert layout(results) == expected
    assert op.backend_on("cuda") != "fused"  # the pretence has ended


class Calls(TorchDispatchMode):
    """The calls of megadit's operators, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "megadit":
            self.calls.append((func, args, result))
        return result


def operator_calls(op: Op[Any, Any], work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of operators in ``work``, in which ``op`` is fused and takes the way of torch.compile."""
    op.select("fused")
    try:
        with monkeypatch.context() as patch, Calls() as calls:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            work()
    finally:
        op.select("auto")
    return calls


def forward_and_backward(name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    case = CASES[name]
    leaves = detached(case.leaves(Shape(2, 6, 144), Draw(dtype, device).tensors()))
    results = case.results(FUSED[name], leaves)
    return list(torch.autograd.grad(results, list(leaves.values()), [torch.ones_like(part) for part in results]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(FUSED))
def test_a_backward_operator_is_the_same_on_every_device(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter's arguments, called again on fake CUDA and on meta tensors, give results of the same layout."""
    calls = operator_calls(FUSED[name], lambda: forward_and_backward(name, "cpu", dtype), monkeypatch).calls
    assert any("backward" in str(func) for func, *_ in calls) == CASES[name].has_backward
    for func, args, result in calls:
        with fake_cuda():
            fake = func(*tree_map(lambda leaf: like(leaf) if isinstance(leaf, Tensor) else leaf, args))
            assert {leaf.device.type for leaf in of_tensors(fake)} == {"cuda"}
            assert layout(of_tensors(fake)) == layout(of_tensors(result)), func
        meta = func(*tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, args))
        assert layout(of_tensors(meta)) == layout(of_tensors(result)), func


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("name", list(FUSED))
def test_autograd_is_wired_on_the_meta_device(name: str, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operand gets a gradient of its shape and dtype, by the autograd function and by the operator alike."""
    op = FUSED[name]
    op.select("fused")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
            grads = forward_and_backward(name, "meta", torch.bfloat16)
    finally:
        op.select("auto")
    leaves = CASES[name].leaves(Shape(2, 6, 144), Draw(torch.bfloat16, "meta").tensors())
    assert [(grad.shape, grad.dtype) for grad in grads] == [(leaf.shape, leaf.dtype) for leaf in leaves.values()]


# Of each family the largest model of the paper, with as many blocks as show what a block can be: U-ViT's first, middle
# and last, MMDiT's last.
MODELS = {
    "dit": ("dit/xl-2-mup.yaml", 2),
    "pixart": ("pixart/target-mup.yaml", 2),
    "uvit": ("uvit/l-2-mup.yaml", 2),
    "mmdit": ("mmdit/18b-mup.yaml", 2),
}


def config_of(family: str, **changes: Any) -> ModelConfig:
    path, depth = MODELS[family]
    model = load_config(path).model
    return ModelConfig(**{**model.model_dump(exclude_unset=True), "depth": depth, "repa": None, **changes})


class Recorder:
    """Of every call of an operation: its name, the implementation that ran, the layout of what it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        call = Op.__call__

        def recorded(op: Any, x: Tensor, *args: Any, **options: Any) -> Any:
            result = call(op, x, *args, **options)
            self.calls.append((op.name, op.backend_on(x.device.type), result_layout(op.name, result)))
            return result

        monkeypatch.setattr(Op, "__call__", recorded)


def inputs_of(config: ModelConfig, samples: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.zeros(samples, config.in_channels, config.input_size, config.input_size)
    return x, torch.zeros(samples), example_conditioning(config, range(samples))


def to_fake(inputs: tuple[Tensor, Tensor, Conditioning]) -> tuple[Any, Any, Conditioning]:
    """Inside ``fake_cuda``."""
    x, t, cond = inputs
    return like(x), like(t), Conditioning(**{name: like(value) for name, value in vars(cond).items()})


@pytest.mark.parametrize("family", list(MODELS))
def test_the_whole_model_takes_every_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the paper's largest width, in bfloat16; the CPU's side is torch on the meta device, operation by operation."""
    config = config_of(family)
    inputs = inputs_of(config)
    recorder = Recorder(monkeypatch)
    meta = build_model(config, device="meta").to(torch.bfloat16)
    with torch.no_grad():
        expected = meta(inputs[0].to("meta"), inputs[1].to("meta"), inputs[2].to("meta"))
    reference, recorder.calls = recorder.calls, []
    model = build_model(config, device="meta")
    with fake_cuda():
        to_fake_cuda(model, torch.bfloat16)
        out = model(*to_fake(inputs))
        assert out.device.type == "cuda" and layout(out) == layout(expected)
    called = {name for name, *_ in recorder.calls}
    assert called & FUSED.keys(), "the model calls no fused operation"
    assert {backend for name, backend, _ in recorder.calls if name in FUSED} <= {"fused"}
    assert {backend for name, backend, _ in recorder.calls if name == "attention"} == {"varlen"}
    assert "fused" not in {backend for _, backend, _ in reference}
    assert [(name, results) for name, _, results in recorder.calls] == [(name, got) for name, _, got in reference]


def test_the_families_call_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that no model calls would not be driven by the test above."""
    recorder = Recorder(monkeypatch)
    for family in MODELS:
        config = config_of(family)
        inputs = inputs_of(config, 1)
        with torch.no_grad():
            build_model(config, device="meta")(*(value.to("meta") for value in inputs))
    assert {name for name, *_ in recorder.calls} >= {name for name in FUSED if CASES[name].in_model}


@pytest.mark.parametrize("family", list(MODELS))
def test_a_compiled_block_is_one_graph(family: str) -> None:
    """As train.compile compiles: every block on its own, here refused where a graph would break."""
    config = config_of(family)
    inputs, model = inputs_of(config), build_model(config, device="meta")
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with compiling(), fake_cuda():
        to_fake_cuda(model, torch.bfloat16)
        expected = layout(model(*to_fake(inputs)))
        for stage in model.stages():
            if stage.is_block:
                stage.compile(fullgraph=True, backend=backend)
        assert layout(model(*to_fake(inputs))) == expected
    assert any("megadit." in name for name in operators) or family == "uvit", "no operator is in the graphs"
    without_mask = any("torch_attn" in name for name in operators)
    assert without_mask == (family in ("mmdit", "pixart")), "padding of texts is left out by lengths"


def test_a_kernel_that_is_not_taken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    op = FUSED["norm_modulate"]
    with fake_cuda():
        op.discard("none")  # clears what was chosen
        op.select("torch")
        leaves = CASES["norm_modulate"].leaves(Shape(1, 2, 16), Draw(torch.bfloat16, "cuda", values=False).tensors())
        CASES["norm_modulate"].results(op, leaves)
    assert [backend for _, backend, _ in recorder.calls] == ["torch"]
    assert all(load_object(path).choice == "auto" for path in OPS.values())
