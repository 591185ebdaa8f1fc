"""The fused AdamW, in Triton's interpreter, against float64 and torch's own; apex's by a stand-in for its module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.kernels.interpreter import Arena, counted, faulty, need_interpreter
from megadit_kernels.adamw import ApexAdamW, FusedAdamW, Shard, update

BETAS = (0.9, 0.999)
# Parameters of a group lie in one buffer, so that those behind an odd one are not aligned: 21, 1,300, 2,048 elements.
SIZES = (21, 1300, 2048)


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> None:
    if not request.node.get_closest_marker("gpu"):
        need_interpreter()


def draw_shards(dtype: torch.dtype = torch.float32, copy: torch.dtype | None = None) -> list[Shard]:
    """Two buffers, of several gradients each, with scalars and scales of their own, after some updates."""
    torch.manual_seed(0)
    shards = []
    for number, sizes in enumerate((SIZES, SIZES[::-1])):
        count = sum(sizes)
        shards.append(
            Shard(
                torch.randn(count),
                torch.randn(count) / 10,
                torch.rand(count) / 100,
                torch.tensor(3.0 + 4 * number),
                tuple((torch.randn(size) / 3).to(dtype) for size in sizes),
                lr=0.01 * (1 + number),
                weight_decay=0.3 * (1 + number),
                eps=1e-2 / (1 + number),
                scale=torch.tensor(0.25 + number),
                copy=None if copy is None else torch.zeros(count, dtype=copy),
            )
        )
    return shards


def cloned(shard: Shard, dtype: torch.dtype = torch.float32) -> Shard:
    """With its own buffers; the moments and masters, and what they are computed from, of ``dtype``."""
    copy = None if shard.copy is None else shard.copy.clone()
    wide = {name: getattr(shard, name).to(dtype, copy=True) for name in ("master", "exp_avg", "exp_avg_sq", "scale")}
    return replace(shard, **wide, copy=copy)


def run(shards: list[Shard], gate: Tensor | None = None, betas: tuple[float, float] = BETAS) -> list[Tensor]:
    from megadit_kernels.adamw.fused import Updater

    return Updater()(shards, betas, gate)


def check(shards: list[Shard], gate: Tensor | None = None, betas: tuple[float, float] = BETAS) -> None:
    """Masters, moments, copies and counters after an update, against the reference in float64.

    Errors are relative to a value before the update plus its change, by a few roundings of float32 (6e-8).
    """
    before, expected = ([cloned(shard, torch.float64) for shard in shards] for _ in range(2))
    steps, exact_steps = run(shards, gate, betas), update(expected, betas, gate)
    assert [float(step) for step in steps] == [float(step) for step in exact_steps], "counter"
    for ours, exact, start in zip(shards, expected, before, strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq"):
            value, old = getattr(exact, name), getattr(start, name)
            error = ((getattr(ours, name).double() - value).abs() / (old.abs() + (value - old).abs())).max()
            assert error < 4e-7, f"{name}: {error:.2e}"
        if ours.copy is not None:
            assert torch.equal(ours.copy, ours.master.to(ours.copy.dtype)), "copy: not the rounded master"


@pytest.mark.parametrize(
    ("dtype", "copy"),
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_update_of_masters_moments_and_copy(dtype: torch.dtype, copy: torch.dtype | None) -> None:
    check(draw_shards(dtype, copy))


@pytest.mark.parametrize("count", [0, 1, 7, 50, 400, 30_000])
def test_bias_correction_of_any_number_of_updates(count: int) -> None:
    [shard, _] = draw_shards()
    check([replace(shard, step=torch.tensor(float(count)), eps=1e-12, lr=1.0, weight_decay=0.0)])


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.5, 0.95), (0.9, 0.99999)])
def test_other_betas(betas: tuple[float, float]) -> None:
    check(draw_shards()[:1], betas=betas)


def test_a_gate_of_zero_lets_the_update_through_and_any_other_nothing() -> None:
    check(draw_shards(torch.bfloat16, torch.bfloat16), torch.tensor(0.0))
    shards = draw_shards(torch.bfloat16, torch.bfloat16)
    shards = [replace(shard, gradients=tuple(g * float("nan") for g in shard.gradients)) for shard in shards]
    before = [cloned(shard) for shard in shards]
    steps = run(shards, torch.tensor(1.0))
    for step, shard, unchanged in zip(steps, shards, before, strict=True):
        assert torch.equal(step, unchanged.step)
        for name in ("master", "exp_avg", "exp_avg_sq", "copy"):
            assert torch.equal(getattr(shard, name), getattr(unchanged, name)), name


def test_gradients_of_several_types_and_elements_without_one() -> None:
    """The end of a buffer may be padding, which has no gradient: it keeps its values."""
    [shard, _] = draw_shards(copy=torch.bfloat16)
    first, second, _ = shard.gradients
    shard = replace(shard, gradients=(first, torch.zeros(0), second.bfloat16()))
    end, before = len(first) + len(second), shard.master.clone()
    exact = cloned(shard, torch.float64)
    run([shard])
    update([exact], BETAS)
    torch.testing.assert_close(shard.master.double(), exact.master, rtol=1e-6, atol=1e-6)
    assert torch.equal(shard.master[end:], before[end:]) and not torch.equal(shard.master[:end], before[:end])


def test_gradients_that_lie_side_by_side_are_one_segment() -> None:
    flat = torch.randn(4096)
    shard = replace(draw_shards()[0], gradients=(flat[:1000], flat[1000:1001], flat[1001:3369]))
    with counted() as launches:
        check([shard])
    assert [(launch.name, launch.programs) for launch in launches] == [("update", 4)]


def test_gradients_whose_places_in_memory_change() -> None:
    """They are joined in other ways at every step; one map of programs is kept for each launch."""
    from megadit_kernels.adamw.fused import Updater

    updater, flat, [shard, _] = Updater(), torch.randn(4096), draw_shards()
    exact = cloned(shard, torch.float64)
    for cut in (0, 1, 1500, 0, 2048):
        parts = (flat[:cut].clone(), flat[cut : len(shard.master)])
        updater([replace(shard, gradients=parts)], BETAS)
        update([replace(exact, gradients=parts)], BETAS)
    torch.testing.assert_close(shard.master.double(), exact.master, rtol=1e-6, atol=1e-6)
    assert len(updater._maps) == 1


def test_too_many_gradients_are_refused() -> None:
    shard = draw_shards()[0]
    with pytest.raises(ValueError, match="3,370 elements of gradients for 3,369 of masters"):
        run([replace(shard, gradients=(*shard.gradients, torch.zeros(1)))])


def test_nothing_is_read_or_written_outside() -> None:
    """Inputs lie between NaN; what is written, too, once between NaN and once between sentinels."""
    for shard in draw_shards(torch.bfloat16, torch.bfloat16):
        arena = Arena()

        def between_sentinels(value: Tensor, arena: Arena = arena) -> Tensor:
            return arena.output(tuple(value.shape), value.dtype).copy_(value)

        for place in (arena.operand, between_sentinels):
            gradients = tuple(arena.operand(gradient) for gradient in shard.gradients)
            buffers = {name: place(getattr(shard, name)) for name in ("master", "exp_avg", "exp_avg_sq", "copy")}
            check([replace(shard, **buffers, gradients=gradients)])
        arena.check()


@pytest.mark.parametrize(("dtype", "per_parameter"), [(torch.bfloat16, 28), (torch.float32, 30)], ids=str)
def test_bytes_per_parameter(dtype: torch.dtype, per_parameter: int) -> None:
    """Gradient, master and moments are read, master, moments and bf16 copy written: each once."""
    count = 32 * 1024
    master, exp_avg, exp_avg_sq = torch.randn(count), torch.zeros(count), torch.zeros(count)
    gradient, copy = torch.randn(count).to(dtype), torch.zeros(count, dtype=torch.bfloat16)
    shard = Shard(master, exp_avg, exp_avg_sq, torch.tensor(0.0), (gradient,), 1e-3, 0.1, 1e-8, torch.tensor(0.5), copy)
    with counted() as launches:
        run([shard], torch.tensor(0.0))
    [launch] = launches
    assert per_parameter <= launch.bytes / count < 1.002 * per_parameter
    with counted() as launches:
        run([shard], torch.tensor(1.0))
    assert launches[0].bytes < 0.01 * count  # a skipped update moves nothing


def on(device: str, shard: Shard) -> Shard:
    moved = {name: value.to(device) for name, value in vars(shard).items() if torch.is_tensor(value)}
    return replace(shard, **moved, gradients=tuple(gradient.to(device) for gradient in shard.gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, skip: float) -> None:
    """Compiled: aligned blocks and others, with a copy that is already that of the masters where nothing changes."""
    shards = [on("cuda", shard) for shard in draw_shards(dtype, torch.bfloat16)]
    for shard in shards:
        shard.copy.copy_(shard.master)  # type: ignore[union-attr]
    check(shards, torch.tensor(skip, device="cuda"))
    large = torch.randn(1 << 22, device="cuda")
    shard = Shard(large, torch.zeros_like(large), torch.zeros_like(large), torch.zeros((), device="cuda"),
                  (torch.randn_like(large).to(dtype),), 1e-3, 0.1, 1e-8)  # fmt: skip
    check([shard], torch.tensor(skip, device="cuda"))


class TestFusedAdamW:
    """The optimizer around the kernel."""

    GROUPS = (
        {"lr": 0.02, "weight_decay": 0.4, "eps": 1e-8},
        {"lr": 0.005, "weight_decay": 0.0, "eps": 1e-3},
    )

    def pair(self, *shapes: tuple[int, ...]) -> tuple[Any, Any]:
        """The fused optimizer and torch's over equal parameters, one group for each shape."""

        def optimizer(make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
            torch.manual_seed(0)
            params = [torch.randn(shape).requires_grad_() for shape in shapes]
            return make([{"params": [p], **row} for p, row in zip(params, self.GROUPS, strict=True)])

        options = {"lr": 1.0, "betas": BETAS, "eps": 1.0, "weight_decay": 1.0}
        return (
            optimizer(lambda groups: FusedAdamW(groups, **options)),
            optimizer(lambda groups: torch.optim.AdamW(groups, fused=True, **options)),
        )

    @staticmethod
    def train(*optimizers: Any, steps: int = 3, seed: int = 1) -> None:
        for step in range(steps):
            for optimizer in optimizers:
                torch.manual_seed(seed + step)
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9  # as a schedule
                    for p in group["params"]:
                        p.grad = torch.randn(p.shape)
                optimizer.step()

    @staticmethod
    def assert_same(ours: Any, theirs: Any) -> None:
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            for p, q in zip(a["params"], b["params"], strict=True):
                torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
                mine, other = ours.state[p], theirs.state[q]
                assert mine.keys() == other.keys() and torch.equal(mine["step"], other["step"])
                for key in ("exp_avg", "exp_avg_sq"):
                    torch.testing.assert_close(mine[key], other[key], rtol=1e-6, atol=1e-7)

    def test_all_groups_are_updated_by_one_launch_as_torch_updates_them(self) -> None:
        ours, theirs = self.pair((30, 40), (7,))
        with counted() as launches:
            self.train(ours)
        self.train(theirs)
        self.assert_same(ours, theirs)
        assert [launch.name for launch in launches] == ["update"] * 3

    def test_either_goes_on_where_the_other_stopped(self) -> None:
        ours, theirs = self.pair((30, 40), (7,))
        self.train(ours, theirs)
        ours_then, theirs_then = ours.state_dict(), theirs.state_dict()
        assert {*ours_then["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}
        ours.load_state_dict(theirs_then)
        theirs.load_state_dict(ours_then)
        self.train(ours, theirs, seed=9)
        self.assert_same(ours, theirs)

    def test_a_gradient_laid_out_otherwise_in_memory(self) -> None:
        """Which torch 2.13's fused AdamW takes by its memory, on the CPU."""
        ours, theirs = self.pair((30, 40), (7,))
        gradient = torch.randn(40, 30).t()
        for optimizer, layout in ((ours, gradient), (theirs, gradient.contiguous())):
            optimizer.param_groups[0]["params"][0].grad = layout
            optimizer.step()
        torch.testing.assert_close(ours.param_groups[0]["params"], theirs.param_groups[0]["params"])
        assert not ours.state[ours.param_groups[1]["params"][0]]  # it had no gradient

    def test_found_inf_skips_the_step(self) -> None:
        ours, _ = self.pair((30, 40), (7,))
        ours.found_inf = torch.tensor(1.0)
        before = [p.detach().clone() for group in ours.param_groups for p in group["params"]]
        self.train(ours)
        for p, unchanged in zip((p for g in ours.param_groups for p in g["params"]), before, strict=True):
            assert torch.equal(p, unchanged) and float(ours.state[p]["step"]) == 0

    def test_prepared_operands_serve_one_step(self) -> None:
        ours, theirs = self.pair((30, 40), (7,))
        weight, other = ours.param_groups[0]["params"][0], theirs.param_groups[0]["params"][0]
        gradient, copy = torch.randn(1200).bfloat16(), torch.zeros(1200, dtype=torch.bfloat16)
        ours.prepare(weight, gradients=gradient.split(500), scale=torch.tensor(0.5), copy=copy)
        ours.step()
        other.grad = gradient.float().view(30, 40) / 2
        theirs.step()
        torch.testing.assert_close(weight, other, rtol=2e-6, atol=1e-6)
        assert torch.equal(copy, weight.detach().flatten().bfloat16())
        after = weight.detach().clone()
        ours.step()
        assert torch.equal(weight, after)  # there is no gradient any more

    def test_only_float32_masters(self) -> None:
        p = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
        p.grad = torch.zeros_like(p)
        with pytest.raises(TypeError, match="FusedAdamW updates float32 masters, not torch.bfloat16"):
            FusedAdamW([p], 1e-3, BETAS, 1e-8).step()

    def test_learning_rates_and_muP_scalars_are_no_constants_of_the_compiler(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every step calls the kernel with the same values outside of tensors: it is compiled once."""
        from megadit_kernels.adamw import triton_kernels

        calls = []

        class Recorder:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                return lambda *arguments, **options: calls.append((arguments, options))

        parameters = inspect.signature(triton_kernels.update.fn).parameters
        constants = [name for name, p in parameters.items() if "constexpr" in str(p.annotation)]
        assert constants == ["GRADIENT", "COPY", "BLOCK"]
        monkeypatch.setattr(triton_kernels, "update", Recorder())
        ours, _ = self.pair((30, 40), (7,))
        self.train(ours)
        for group in ours.param_groups:
            group.update(lr=1.0, weight_decay=2.0, eps=3.0)
        self.train(ours)
        fixed = [
            ([value for value in arguments if not torch.is_tensor(value)], options) for arguments, options in calls
        ]
        assert len(fixed) == 6 and all(values == fixed[0] for values in fixed)

    @pytest.mark.parametrize("fake", [False, True])
    def test_without_values(self, fake: bool) -> None:
        """On the meta device and on fake CUDA tensors: a step makes state of the right form and launches nothing."""
        device = "cuda" if fake else "meta"
        with FakeTensorMode() if fake else torch.device("meta"):
            p = torch.empty(8, 4, device=device, requires_grad=True)
            p.grad = torch.empty(8, 4, device=device)
            optimizer = FusedAdamW([p], 1e-3, BETAS, 1e-8)
            with counted() as launches:
                optimizer.step()
        state = optimizer.state[p]
        assert not launches and {value.device.type for value in state.values()} == {device}
        assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == {
            "step": ((), torch.float32),
            "exp_avg": ((8, 4), torch.float32),
            "exp_avg_sq": ((8, 4), torch.float32),
        }


FAULTS = {
    "the clip coefficient is left out": (
        "        scale = tl.load(scale_address.to(tl.pointer_type(tl.float32)))",
        "        scale = 1.0",
    ),
    "the gate is ignored": ("size = tl.where(applied == 0.0, 0, size)", "size = size"),
    "a skipped update is counted": ("step + applied)", "step + 1.0)"),
    "the decay of another group": ("decay = _float(entry + _DECAY)", "decay = _float(table + _DECAY)"),
    "eps of another group": ("eps = _float(entry + _EPS)", "eps = _float(table + _EPS)"),
    "the rate of another group": ("lr = _float(entry + _LR)", "lr = _float(table + _LR)"),
    "eps is outside of the quotient": (
        "denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps",
        "denominator = tl.div_rn(tl.sqrt_rn(v), root2)",
    ),
    "eps before the correction": (
        "denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps",
        "denominator = tl.div_rn(tl.sqrt_rn(v) + eps, root2)",
    ),
    "eps within the root": (
        "denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps",
        "denominator = tl.div_rn(tl.sqrt_rn(v + eps), root2)",
    ),
    "the first bias correction": ("lr / correction1 * m", "lr * m"),
    "the second bias correction": ("root2 = tl.sqrt_rn(_correction(step + 1.0, log_beta2))", "root2 = 1.0"),
    "the update that is made is not counted": (
        "correction1 = _correction(step + 1.0, log_beta1)",
        "correction1 = _correction(step, log_beta1)",
    ),
    "decay added to the gradient": ("p = p - decay * p", "m = m + decay * p"),
    "the second moment is not squared": ("one_minus_beta2 * g * g", "one_minus_beta2 * g"),
    "moments of one for the other": (
        "m = beta1 * tl.load(exp_avg + offsets",
        "m = beta1 * tl.load(exp_avg_sq + offsets",
    ),
    "no copy": ("        tl.store(copy + offsets, p.to(COPY), mask=inside)", "        pass"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_the_kernel_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit_kernels.adamw import fused

    gate = torch.tensor(float("skip" in fault or "gate" in fault))
    shards = draw_shards(torch.bfloat16, torch.bfloat16)
    if fault == "no copy":  # of whole, aligned blocks and of others
        shards = [replace(shard, gradients=(torch.cat(shard.gradients),)) for shard in shards]
    if gate:
        for shard in shards:
            shard.copy.copy_(shard.master)  # type: ignore[union-attr]
    monkeypatch.setattr(fused, "triton_kernels", faulty(fused.triton_kernels, *FAULTS[fault], tmp_path))
    with pytest.raises(AssertionError, match="master|exp_avg|copy|counter"):
        check(shards, gate)


def apex_stand_in() -> tuple[ModuleType, ModuleType]:
    """Modules of the names and signatures of apex's: ``amp_C.multi_tensor_adam`` computes as its CUDA code does."""

    def multi_tensor_adam(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        /,
    ) -> None:
        assert chunk_size == 2048 * 32 and noop_flag.dtype == torch.int32 and isinstance(step, int)
        assert isinstance(lr, float) and (mode, bias_correction) == (1, 1)
        for g, p, m, v in zip(*tensor_lists, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v / (1 - beta2**step)).sqrt() + epsilon
            p.sub_(lr * (m / (1 - beta1**step) / denominator + weight_decay * p))

    class MultiTensorApply:
        def __init__(self, chunk_size: int) -> None:
            self.chunk_size = chunk_size

        def __call__(self, op: Callable[..., None], noop_flag: Tensor, tensor_lists: Any, *args: Any) -> None:
            return op(self.chunk_size, noop_flag, tensor_lists, *args)

    amp, apply = ModuleType("amp_C"), ModuleType("apex.multi_tensor_apply")
    amp.multi_tensor_adam = multi_tensor_adam  # type: ignore[attr-defined]
    apply.multi_tensor_applier = MultiTensorApply(2048 * 32)  # type: ignore[attr-defined]
    return amp, apply


def test_apexs_kernel_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    amp, apply = apex_stand_in()
    monkeypatch.setitem(sys.modules, "amp_C", amp)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", apply)
    check_apex("cpu")


@pytest.mark.gpu
def test_apexs_kernel() -> None:
    pytest.importorskip("amp_C", reason="NVIDIA's apex is not installed")
    check_apex("cuda")


def check_apex(device: str) -> None:
    torch.manual_seed(0)
    starts = [torch.randn(30, 40, device=device), torch.randn(7, device=device)]
    groups = TestFusedAdamW.GROUPS
    options = {"lr": 1.0, "betas": BETAS, "eps": 1.0, "weight_decay": 1.0}

    def rows() -> list[dict[str, Any]]:
        return [{"params": [p.clone().requires_grad_()], **row} for p, row in zip(starts, groups, strict=True)]

    apex, torchs = ApexAdamW(rows(), **options), torch.optim.AdamW(rows(), fused=True, **options)
    for _ in range(3):
        for a, b in zip(apex.param_groups, torchs.param_groups, strict=True):
            a["params"][0].grad = torch.randn_like(a["params"][0])
            b["params"][0].grad = a["params"][0].grad.clone()
        apex.step()
        torchs.step()
    for a, b in zip(apex.param_groups, torchs.param_groups, strict=True):
        [p], [q] = a["params"], b["params"]
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert apex.state[p]["step"] == 3 and apex.state[p].keys() == torchs.state[q].keys()
