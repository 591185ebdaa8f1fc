"""Collectives: what runs of two ranks call is what the plan counts and what docs/parallel.md says, byte for byte."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, layout_of, small_config, train_on
from megadit.config import ModelConfig
from megadit.config.deepspeed.gradients import gradient_bytes
from megadit.models import build_model
from megadit.mup.example import example_conditioning, example_images
from megadit.parallel.collectives import ring_bytes
from megadit.parallel.tensor import TensorLayout
from megadit.plan.communication import data_bytes, tensor_bytes
from megadit.plan.layout import plan_layout
from megadit.plan.memory import stage_costs

BATCH, TEXT = 5, 10  # of which no two sizes in the tables are equal
MADE = {"dit": tiny_dit, "pixart": tiny_pixart, "uvit": tiny_uvit, "mmdit": tiny_mmdit}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"
REAL = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def least_data_bytes(parameters: int, item: int, replicas: int, gradient: int | None = None) -> float:
    """The least between replicas: a sum of which each has a share, and the new weights back (Rajbhandari et al. 2020,
    section 7)."""
    sums = ring_bytes("reduce_scatter", parameters * (gradient or item), replicas)
    return sums + ring_bytes("all_gather", parameters * item, replicas)


def note_calls() -> Counter[tuple[str, int]]:
    """From now on every collective of torch is counted, by its kind and the bytes of its larger side."""
    import torch.distributed as dist

    calls: Counter[tuple[str, int]] = Counter()

    def recorded(kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[kind, max(part.nbytes for part in args if isinstance(part, torch.Tensor))] += 1
            return function(*args, **kwargs)

        return call

    for name, kind in REAL.items():
        setattr(dist, name, recorded(kind, getattr(dist, name)))
    return calls


def run_once(config: ModelConfig, recompute: Any, sequence: bool) -> Counter[tuple[str, int]]:
    import torch.distributed as dist

    model = build_model(config, TensorLayout(2, dist.get_rank(), sequence, dist.group.WORLD))
    model.recompute = recompute
    numbers = range(BATCH)
    x, t, cond = example_images(config, numbers), torch.full((BATCH,), 3.0), example_conditioning(config, numbers)
    calls = note_calls()
    out = model(x, t, cond)
    out.backward(torch.ones_like(out))
    return calls


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("family", MADE)
def test_ranks_call_what_the_plan_counts(family, sequence):
    for recompute in ("none", "full") if family in ("dit", "mmdit") else ("none",):
        config = MADE[family](width=64, heads=4)
        [(_, planned)] = stage_costs(
            config, (0, config.blocks + 2), BATCH, torch.float32, recompute, 2, sequence=sequence
        )
        for called in run_ranks(2, run_once, config, recompute, sequence):
            assert called == planned.forward + planned.backward


def documented() -> dict[tuple[str, str], list[str]]:
    """(family, layout) -> forward, backward, sent, least, of the table of docs/parallel.md."""
    rows = re.findall(r"^\| (dit|pixart|uvit|mmdit) \| (tensor|sequence) \| (.*) \|$", DOCUMENT.read_text(), re.M)
    return {(family, layout): row.split(" | ") for family, layout, row in rows}


def value(term: str, sizes: dict[str, int]) -> int:
    """``B·6n`` and the like, in elements: numbers and letters multiply."""
    product = 1
    for factor in re.findall(r"\d+|[BTLPn]", term):
        product *= int(factor) if factor.isdigit() else sizes[factor]
    return product


def calls_of(cell: str, sizes: dict[str, int]) -> Counter[tuple[str, int]]:
    calls: Counter[tuple[str, int]] = Counter()
    for part in filter(None, cell.split("; ")):
        times, kind, term = part.split(" ")
        calls[kind, 4 * value(term, sizes)] += int(times)
    return calls


@functools.cache
def counted(family: str, layout: str) -> tuple[list[Counter[tuple[str, int]]], dict[str, int]]:
    """Forward and backward collectives of depth 2, and of depth 4; and what the letters of the tables stand for."""
    per: dict[str, dict[str, Any]] = {
        "pixart": {"text": {"dim": 20, "max_length": TEXT}},
        "mmdit": {"text": {"dim": 20, "max_length": TEXT, "pooled_dim": 12}},
        "uvit": {"mlp_time_embed": True},
    }
    calls: list[Counter[Any]] = []
    for depth in (2, 4):
        config = MADE[family](width=64, heads=4, depth=depth, **per.get(family, {}))
        [(chunk, cost)] = stage_costs(
            config, (0, config.blocks + 2), BATCH, torch.float32, "none", 2, sequence=layout == "sequence"
        )
        calls += [cost.forward, cost.backward]
    tokens = chunk.model.stream_tokens
    assert tokens is not None
    return calls, {"B": BATCH, "T": tokens, "L": TEXT, "n": 64, "P": config.patch_size**2 * config.out_channels}


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
@pytest.mark.parametrize("family", MADE)
def test_the_document_tells_every_collective_of_a_block(family, layout):
    calls, sizes = counted(family, layout)  # the ends of the model cancel in the difference of two depths
    blocks = 1 if family == "uvit" else 2  # there the table speaks of two blocks, one of which has a skip
    forward, backward, sent, least = documented()[family, layout]
    documented_calls = [calls_of(forward, sizes), calls_of(backward, sizes)]
    for before, after, cell in zip(calls[:2], calls[2:], documented_calls, strict=True):
        more = after.copy()
        more.subtract(before)
        assert {key: times for key, times in more.items() if times} == {k: blocks * v for k, v in cell.items()}
    rings = sum(tensor_bytes(documented_calls[0] + documented_calls[1], 2).values())  # type: ignore[arg-type]
    total, bound = (2 * sum(value(term, sizes) for term in cell.split(" + ")) for cell in (sent, least))
    assert rings == total >= bound  # e (t - 1) / t is 2 here


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
@pytest.mark.parametrize("family", MADE)
def test_the_document_tells_every_collective_beside_the_blocks(family, layout):
    calls, sizes = counted(family, layout)
    rows = re.findall(rf"^\| {family}, once \| {layout} \| (.*) \| (.*) \|$", DOCUMENT.read_text(), re.M)
    others = 2 if family in ("dit", "pixart") else 1  # blocks, or pairs of them, that the table of blocks tells of
    for all_of_two, once, per_block in zip(calls[:2], rows[0], documented()[family, layout][:2], strict=True):
        documented_calls = calls_of(once, sizes)
        for key, times in calls_of(per_block, sizes).items():
            documented_calls[key] += others * times
        assert documented_calls == all_of_two


def test_rings_send_the_least():
    assert ring_bytes("all_reduce", 100, 4) == 150 and ring_bytes("all_gather", 100, 4) == 75
    assert data_bytes(50, 2, 1, 1, 3, recompute=False) == {}
    least = least_data_bytes(50, 2, 4)
    totals = {stage: sum(data_bytes(50, 2, 4, stage, 3, recompute=False).values()) / least for stage in (0, 1, 2, 3)}
    assert totals == {0: 1.0, 1: 1.5, 2: 3.5, 3: 3.0}
    far = [data_bytes(50, 2, 4, 3, 3, recompute=False, reuse=n)["data all_gather of weights"] for n in (0, 50, 100)]
    assert [size / least for size in far] == [3.0, 2.25, 1.5]
    assert least_data_bytes(50, 2, 4, 4) == 1.5 * least
    assert sum(data_bytes(50, 2, 4, 1, 3, recompute=False, gradient=4).values()) == 2.5 * least


def sent_between_replicas(config: Any, folder: str, ds: Any) -> tuple[dict[str, int], int]:
    """What DeepSpeed sends between replicas in one step, in bytes of whole tensors by kind; scalars left out."""
    import sys

    run = assemble_rank(config, folder, None, ds)
    train_on(run, 1)
    backend = sys.modules["deepspeed.comm.torch"].TorchBackend  # type: ignore[attr-defined]
    sent: Counter[str] = Counter()

    def recorded(name: str, function: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            size = max(part.nbytes for part in [*args, *kwargs.values()] if isinstance(part, torch.Tensor))
            sent[name] += size if size > 64 else 0
            return function(self, *args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(backend, name, recorded(name, getattr(backend, name)))
    train_on(run, 2)
    return dict(sent), sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "ds", "summed"),
    [(0, {}, 4), (1, {}, 4), (1, {"communication_data_type": "bf16"}, 2), (2, {}, 2)],
    ids=["0", "1", "1-bf16", "2"],
)
def test_replicas_send_what_the_plan_says(tmp_path, stage, ds, summed):
    train = {"micro_batch": 4, "precision": "fp32" if stage == 0 else "bf16"}
    config = small_config(parallel={"zero_stage": stage}, train=train)
    sent, parameters = run_ranks(2, sent_between_replicas, config, str(tmp_path), ds)[0]
    assert gradient_bytes(layout_of(config, 2, ds)[1], train["precision"])[1] == summed
    planned = data_bytes(parameters, 4 if stage == 0 else 2, 2, stage, 2, recompute=False, gradient=summed)
    gathered = sent.get("all_gather_into_tensor", 0)
    assert ring_bytes("all_reduce", sent["all_reduce"], 2) == planned["data all_reduce of gradients"]
    # Groups are padded to whole shares.
    assert ring_bytes("all_gather", gathered, 2) == pytest.approx(
        planned.get("data all_gather of weights", 0), rel=1e-3
    )


WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
NEAR = {**WHOLE, "stage3_max_reuse_distance": 60000}
# DeepSpeed's own settings: every tensor of this model is small enough to stay.
FETCHES: list[Any] = [
    pytest.param({}, "none", id="own"),
    pytest.param(NEAR, "full", id="recomputed"),
    *(
        pytest.param(keys, "none", id=name, marks=pytest.mark.slow)
        for name, keys in {
            "far": {**WHOLE, "stage3_max_reuse_distance": 0},
            "near": NEAR,
            "small": {**NEAR, "stage3_param_persistence_threshold": 1100},
            "ahead": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 60000},
        }.items()
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("keys", "recompute"), FETCHES)
def test_what_zero_3_gathers_is_what_it_let_go(tmp_path, keys, recompute):
    train = {"micro_batch": 4, "precision": "bf16", "activation_checkpointing": recompute}
    config, ds = small_config(parallel={"zero_stage": 3}, train=train, model={"depth": 4}), {"zero_optimization": keys}
    sent, parameters = run_ranks(2, sent_between_replicas, config, str(tmp_path), ds)[0]
    resolved, merged = layout_of(config, 2, ds)
    [stage] = plan_layout(resolved, 2, merged, parameters).stages
    assert stage.parameters == parameters
    scattered = ring_bytes("reduce_scatter", sent["reduce_scatter_tensor"], 2)
    gathered = ring_bytes("all_gather", sent["all_gather_into_tensor"], 2)
    assert scattered == pytest.approx(stage.sent["data reduce_scatter of gradients"], rel=1e-2)
    planned = stage.sent["data all_gather of weights"]
    if "stage3_prefetch_bucket_size" in keys or not keys:
        assert gathered == pytest.approx(planned, rel=0.04)  # whole layers go or stay
    else:
        assert ring_bytes("all_gather", 2 * 2 * parameters, 2) <= gathered <= 1.01 * planned
