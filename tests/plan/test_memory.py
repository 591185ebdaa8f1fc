"""The plan counts on the meta device what forward and backward passes hold on the CPU, and the pipeline bubble."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from helpers.kernels.interpreter import need_interpreter, releasing
from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.ranks import run_ranks
from megadit.config import ModelConfig
from megadit.config.schema.kernels import KernelConfig
from megadit.errors import UserError
from megadit.models import build_model
from megadit.models.chunk import build_chunk
from megadit.mup.example import example_conditioning, example_images
from megadit.parallel.tensor import TensorLayout
from megadit.plan.bubble import bubble_share, idle_share
from megadit.plan.kernels import planned_kernels
from megadit.plan.memory import LiveByteCounter, stage_costs
from megadit_kernels import FUSED_KEYS, OPS_OF_KEY, norm_modulate, swiglu

BATCH = 5
REPA = {"block": 1, "feature_dim": 24, "hidden": 32}
FAMILIES = {
    "dit": tiny_dit(qk_norm="rms"),
    "pixart": tiny_pixart(mlp="swiglu"),
    "uvit": tiny_uvit("text"),
    "mmdit": tiny_mmdit(mlp="swiglu", repa=REPA),
}


def costs(config: ModelConfig, recompute: Any = "none", cuts: tuple[int, ...] | None = None) -> list[Any]:
    all_cuts = cuts or (0, config.blocks + 2)
    return [cost for _, cost in stage_costs(config, all_cuts, BATCH, torch.float32, recompute)]


def inputs(config: ModelConfig) -> tuple[Any, ...]:
    return example_images(config, range(BATCH)), torch.full((BATCH,), 500.0), example_conditioning(config, range(BATCH))


def tensors(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def held(config: ModelConfig, recompute: Any, layout: TensorLayout | None = None) -> tuple[int, int]:
    """Bytes that a micro batch on the CPU saves for its backward pass, and the most that it holds."""
    chunk = build_chunk(config, (0, config.blocks + 2), 0, layout)
    chunk.model.recompute, chunk.project = recompute, config.repa is not None
    stage_io = chunk.model.packed_inputs(*inputs(config))
    known = [*chunk.parameters(), *chunk.buffers()]
    for p in chunk.parameters():
        p.grad = torch.zeros_like(p)
        known.append(p.grad)
    with LiveByteCounter(known) as live:
        received = tuple(part.clone() for part in stage_io)  # a pipeline holds them until the backward pass
        out = tensors(chunk(received))
        saved = live.now
        torch.autograd.backward(out, [torch.ones_like(part) for part in out])
    return saved, live.peak


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_device_holds_what_the_cpu_holds(family, recompute):
    saved, peak = held(FAMILIES[family], recompute)
    [counted] = costs(FAMILIES[family], recompute)
    assert counted.saved_bytes == pytest.approx(saved, rel=0.01)
    assert counted.peak_bytes == pytest.approx(peak, rel=0.01)


FUSED = KernelConfig(**dict.fromkeys(FUSED_KEYS, "fused"))


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        pytest.param(family, recompute, marks=[] if recompute == "none" else pytest.mark.slow)
        for family in FAMILIES
        for recompute in ("none", "selective", "full")
    ],
)
def test_fused_kernels_hold_in_the_interpreter_what_is_planned(family, recompute):
    need_interpreter()
    config = FAMILIES[family]
    [torchs] = costs(config, recompute)
    with planned_kernels(FUSED, "cuda") as fused:
        assert fused == FUSED_KEYS
        with releasing():
            saved, peak = held(config, recompute)
        [counted] = costs(config, recompute)
    assert counted.saved_bytes == pytest.approx(saved, rel=0.01)
    assert counted.peak_bytes == pytest.approx(peak, rel=0.01)
    if recompute == "none" and family != "uvit":  # whose fused kernels save what torch's save
        assert counted.saved_bytes < 0.97 * torchs.saved_bytes


def held_by_rank(config: ModelConfig, recompute: Any, sequence: bool) -> tuple[int, int]:
    import torch.distributed as dist

    with planned_kernels(FUSED, "cuda"):
        return held(config, recompute, TensorLayout(2, dist.get_rank(), sequence, dist.new_group([0, 1])))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "recompute", "sequence"),
    [
        ("dit", "none", True),
        *(
            pytest.param(family, recompute, sequence, marks=pytest.mark.slow)
            for family in FAMILIES
            for recompute in ("none", "selective", "full")
            for sequence in (False, True)
            if (family, recompute, sequence) != ("dit", "none", True)
        ),
    ],
)
def test_a_tensor_parallel_rank_of_fused_kernels_holds_what_is_planned(family, recompute, sequence):
    need_interpreter()
    config = FAMILIES[family]
    with planned_kernels(FUSED, "cuda"):
        whole = (0, config.blocks + 2)
        [(_, counted)] = stage_costs(config, whole, BATCH, torch.float32, recompute, 2, sequence=sequence)
    for saved, peak in run_ranks(2, held_by_rank, config, recompute, sequence):
        assert counted.saved_bytes == pytest.approx(saved, rel=0.01)
        assert 0.75 * peak < counted.peak_bytes < 1.01 * peak  # the interpreter lets go of partial sums late


def test_what_is_planned_is_what_would_run_here_and_ends_with_the_plan():
    need_interpreter()
    with planned_kernels(KernelConfig(swiglu="fused"), "cpu") as fused:
        assert fused == ("swiglu",) and swiglu.backend_on("meta") == "fused"
    assert swiglu.choice == "auto" and swiglu.backend_on("meta") == "torch"
    with planned_kernels(KernelConfig(norm_modulate="apex"), "cuda") as fused:
        assert fused == () and norm_modulate.backend_on("meta") == "torch"
    assert norm_modulate.choice == "auto"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "choice", [(key, value) for key in OPS_OF_KEY for value in get_args(KernelConfig.model_fields[key].annotation)]
)
def test_every_choice_of_every_key_is_planned_and_ends_with_the_plan(choice, device):
    if choice[1] == "fused":
        need_interpreter()
    before = {op: op.choice for ops in OPS_OF_KEY.values() for op in ops}
    with planned_kernels(KernelConfig.model_validate(dict([choice])), device):
        [(_, counted)] = stage_costs(FAMILIES["mmdit"], (0, FAMILIES["mmdit"].blocks + 2), BATCH)
        assert counted.saved_bytes > 0
    assert before == {op: op.choice for op in before}


def test_fused_kernels_are_not_planned_without_triton(monkeypatch):
    monkeypatch.setattr("megadit.plan.kernels.find_spec", lambda _: None)
    refused = pytest.raises(
        UserError, match=r"kernels.swiglu: fused is planned by Triton's launchers, and triton is not"
    )
    with refused, planned_kernels(KernelConfig(swiglu="fused"), "cpu"):
        pass
    with planned_kernels(KernelConfig(), "cpu") as fused:
        assert fused == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_in_float32_of_a_half_precision_model_are_counted(family):
    # As the paper's PixArt and U-ViT ask for: the meta device knows no autocast that could be switched off.
    counted = {}
    for precision in ("auto", "fp32"):
        config = FAMILIES[family].model_copy(update={"attention_precision": precision, "norm_precision": precision})
        [(_, counted[precision])] = stage_costs(config, (0, config.blocks + 2), BATCH, torch.bfloat16, "none")
    assert counted["fp32"].saved_bytes > counted["auto"].saved_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_autograd_saves(family):
    config = FAMILIES[family]
    model = build_model(config)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(*inputs(config), project=config.repa is not None)
    total = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    [counted] = costs(config)
    assert counted.saved_bytes == pytest.approx(total, rel=0.06)  # inputs and outputs are held too


def test_recomputation_keeps_less_and_micro_batches_add_up():
    none, selective, full = (costs(FAMILIES["dit"], how)[0] for how in ("none", "selective", "full"))
    assert full.saved_bytes < selective.saved_bytes < none.saved_bytes
    assert full.saved_bytes < full.peak_bytes < none.peak_bytes


def test_stages_hold_together_what_the_whole_holds():
    config = FAMILIES["mmdit"]
    [whole] = costs(config)
    first, second = costs(config, cuts=(0, 2, 5))
    assert first.output_bytes == second.input_bytes > second.input_grad_bytes > 0
    assert first.input_bytes == second.output_bytes == first.input_grad_bytes == 0
    assert first.saved_bytes + second.saved_bytes == pytest.approx(whole.saved_bytes + second.input_bytes, rel=0.02)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 2), (4, 16), (8, 128)])
def test_equal_stages_wait_as_long_as_the_formula_says(stages, micro_batches):
    for recompute in (False, True):
        idle = idle_share([1.0] * stages, micro_batches, recompute)
        assert idle == pytest.approx(bubble_share(stages, micro_batches), abs=1e-12)


def test_all_wait_for_the_slowest_stage():
    assert idle_share([2.0, 1.0], 10_000) == pytest.approx(0.25, abs=1e-3)
