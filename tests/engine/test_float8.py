"""``train.precision: fp8``: what is refused, what a run says, and the same training on every layout of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.compiler import WHOLE, compiling, import_compiler
from helpers.layouts.matrix import matrix_config
from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config import RunConfig, load, merge_ds_config
from megadit.config.schema.float8 import Float8Config
from megadit.engine.float8 import check_float8, describe_float8
from megadit.errors import UserError
from megadit.models import build_model
from megadit.models.float8 import set_float8
from megadit.parallel.tensor import TensorLayout
from megadit.plan.layout import plan_layout
from megadit_kernels import backends

CPU = torch.device("cpu")
STEPS = 4


def config_of(fp8: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    return small_config(
        model={"width": 64, "heads": 4},
        train={"precision": "fp8", "fp8": fp8 or {}, "micro_batch": 4, "steps": STEPS, **(train or {})},
        parallel=parallel,
        ema={"decays": (0.9,)},
    )


@pytest.mark.parametrize(
    ("fp8", "sections", "sentence"),
    [
        ({"scaling": "block"}, {}, "train.fp8.scaling: block is not done by train.fp8.backend torch; set it to tensor"),
        ({"backend": "transformer-engine", "scaling": "row"}, {}, "train.fp8.scaling: row is not done by"),
        (
            {"backend": "transformer-engine"},
            {"parallel": {"tensor": 2}},
            "train.fp8.backend: transformer-engine does not go with parallel.tensor 2, whose ranks would not agree",
        ),
        (
            {"backend": "transformer-engine"},
            {"parallel": {"zero_stage": 3}},
            "train.fp8.backend: transformer-engine does not go with parallel.zero_stage 3",
        ),
        (
            {"backend": "transformer-engine"},
            {"train": {"compile": True}},
            "train.fp8.backend: transformer-engine does not go with train.compile true",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(fp8: Any, sections: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="fp8") as raised:
        config_of(fp8, sections.get("train"), **sections.get("parallel", {}))
    assert sentence in str(raised.value)


def test_a_gpu_without_fp8_units_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(
        UserError, match=r"train.precision: fp8 needs FP8 units, which NVIDIA A100-SXM4-80GB .*8\.0.*bf16"
    ):
        check_float8(config_of(), torch.device("cuda"))
    check_float8(small_config(train={"precision": "bf16"}), torch.device("cuda"))


def test_transformer_engine_that_does_not_work_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.Backend("transformer-engine", "broken", "RuntimeError: no libcudnn")
    monkeypatch.setattr("megadit.engine.float8.backend", lambda _: broken)
    with pytest.raises(UserError, match=r"train.fp8.backend: transformer-engine does not work here \(RuntimeError: no"):
        check_float8(config_of({"backend": "transformer-engine"}), CPU)


def test_a_name_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train.fp8.bf16_layers: 'blocks.7.\*' fits no layer .* like blocks.0.attn.qkv"
    ):
        check_float8(config_of({"bf16_layers": ("blocks.0.*", "blocks.7.*")}), CPU)
    check_float8(config_of({"bf16_layers": ("blocks.0.*",)}), CPU)


def test_the_run_says_what_multiplies_in_fp8() -> None:
    line = describe_float8(config_of({"scaling": "row"}), 8, CPU)
    assert line == (
        "fp8: 8 linear layers by torch._scaled_mm, a scale per row; emulated on the CPU, for tests: slower than bf16"
    )


def test_deepspeed_trains_in_bf16() -> None:
    loaded = load("quickstart/digits.yaml", ["train.precision=fp8"])
    merged = merge_ds_config(loaded, {"bf16": {"enabled": True}}, 1)
    assert merged.config.train.precision == "fp8" and merged.ds_config["bf16"]["enabled"]
    assert merge_ds_config(loaded, {}, 1).ds_config["bf16"]["enabled"]
    for block in ({"fp16": {"enabled": True}}, {"bf16": {"enabled": False}}):
        with pytest.raises(UserError, match='train.precision: "fp8" .* contradicts'):
            merge_ds_config(loaded, block, 1)


def test_the_plan_counts_fp8_operands_and_the_agreements_on_scales() -> None:
    plans = {}
    for precision in ("bf16", "fp8"):
        config = config_of(train={"precision": precision}, tensor=2)
        resolved, ds_config = resolve(config, 2)
        [stage] = plan_layout(resolved, 2, ds_config, 10**5).stages
        plans[precision] = stage
    bf16, fp8 = plans["bf16"].bytes, plans["fp8"].bytes
    assert all(bf16[kind] == fp8[kind] for kind in bf16 if kind != "activations")
    assert bf16["activations"] < fp8["activations"] < 1.5 * bf16["activations"]  # of one layer at a time
    assert sum(plans["bf16"].sent.values()) < sum(plans["fp8"].sent.values()) < 1.01 * sum(plans["bf16"].sent.values())


def resolve(config: RunConfig, world: int) -> tuple[RunConfig, dict[str, Any]]:
    from helpers.training import layout_of

    return layout_of(config, world)


def distance(results: Any, expected: Any, kind: str = "pieces") -> float:
    values, others = merge_weights(results, kind), merge_weights(expected, kind)
    one, other = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (values, others))
    return float((one - other).norm() / other.norm())


def some_quick(quick: list[Any], *axes: tuple[Any, ...]) -> list[Any]:
    """All combinations of ``axes``, those not in ``quick`` marked slow."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(*axes)]


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, by scaling, and in bf16."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {
        scaling: run_ranks(1, train_rank, config_of({"scaling": scaling}, zero_stage=1), str(folder / scaling))
        for scaling in ("tensor", "row")
    }
    runs["bf16"] = run_ranks(1, train_rank, config_of(None, {"precision": "bf16"}, zero_stage=1), str(folder / "bf16"))
    return runs


@pytest.mark.distributed
def test_training_in_fp8_is_near_training_in_bf16(single_process: dict[str, Any]) -> None:
    for scaling in ("tensor", "row"):
        assert single_process[scaling][0]["losses"] == pytest.approx(single_process["bf16"][0]["losses"], rel=0.02)
        assert 1e-4 < distance(single_process[scaling], single_process["bf16"]) < 0.2


@pytest.mark.distributed
@pytest.mark.parametrize(("scaling", "zero_stage"), some_quick([("tensor", 3)], ("tensor", "row"), (1, 2, 3)))
def test_replicas_train_as_one_process(
    scaling: str, zero_stage: int, single_process: dict[str, Any], tmp_path: Path
) -> None:
    """A micro batch is quantised by itself, so that only the order of sums differs."""
    ds: dict[str, Any] = {"communication_data_type": "fp32"}
    if zero_stage == 3:  # DeepSpeed's linear rounds before it adds the bias
        ds["zero_optimization"] = {"memory_efficient_linear": False}
    results = run_ranks(
        2, train_rank, config_of({"scaling": scaling}, zero_stage=zero_stage), str(tmp_path), STEPS, None, ds
    )
    assert results[0]["losses"] == pytest.approx(single_process[scaling][0]["losses"], rel=1e-6)
    assert distance(results, single_process[scaling]) < 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize(("scaling", "sequence"), some_quick([("tensor", True)], ("tensor", "row"), (False, True)))
def test_tensor_parallel_ranks_train_as_one_process(
    scaling: str, sequence: bool, single_process: dict[str, Any], tmp_path: Path
) -> None:
    """To the rounding of shares in bf16, which moves some numbers to the next one of FP8."""
    config = config_of({"scaling": scaling}, tensor=2, sequence=sequence, zero_stage=1)
    results = run_ranks(2, train_rank, config, str(tmp_path))
    assert results[0]["losses"] == pytest.approx(single_process[scaling][0]["losses"], rel=5e-3)
    assert distance(results, single_process[scaling]) < 0.1


@pytest.mark.distributed
@pytest.mark.slow
def test_an_mmdit_with_normed_queries_trains(tmp_path: Path) -> None:
    """Two streams, attention to padded captions; recomputed selectively and sharded, near to one process in bf16."""
    runs = {}
    for precision, parallel in (("bf16", {}), ("fp8", {}), ("fp8", {"tensor": 2, "sequence": True})):
        world, recompute = (2, "selective") if parallel else (1, "none")
        config = matrix_config("mmdit", tmp_path, False, recompute, world=world, zero_stage=1, **parallel)
        sections = config.model_dump()
        sections["train"]["precision"] = precision
        run = run_ranks(world, train_rank, RunConfig.model_validate(sections), str(tmp_path / f"{precision}{world}"))
        runs[f"{precision} {world}"] = run
    bf16, fp8, sharded = runs.values()
    assert fp8[0]["losses"] != bf16[0]["losses"]
    assert fp8[0]["losses"] == pytest.approx(bf16[0]["losses"], rel=0.02)
    assert sharded[0]["losses"] == pytest.approx(fp8[0]["losses"], rel=5e-3)
    assert distance(sharded, fp8) < 0.1


def gradients_of_blocks(scaling: Any, recompute: str, world: int) -> float:
    """Distance of the gradients of blocks that are compiled, as whole graphs, from those of blocks that are not."""
    layout = None
    if world > 1:
        group = torch.distributed.new_group(list(range(world)))
        layout = TensorLayout(world, torch.distributed.get_rank(), True, group)
    config = tiny_dit(width=64, heads=4)
    model = build_model(config, layout)
    randomize(model)
    model.recompute = recompute
    set_float8(model, Float8Config(scaling=scaling))
    results = []
    with compiling():
        for compiled in (False, True):
            if compiled:
                model.compile_blocks(**WHOLE)
            model.zero_grad()
            model(*dit_inputs(config)).square().mean().backward()
            results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float((results[1] - results[0]).norm() / results[0].norm())


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_compiled_blocks_multiply_the_same(scaling: str) -> None:
    assert gradients_of_blocks(scaling, "selective", 1) < 1e-2


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_agreements_on_scales_are_part_of_the_graph(scaling: str) -> None:
    import_compiler()
    assert max(run_ranks(2, gradients_of_blocks, scaling, "selective", 2)) < 1e-2


@pytest.mark.distributed
@pytest.mark.slow
def test_pipeline_stages_train_as_one_process(single_process: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(2, train_rank, config_of({"scaling": "row"}, pipeline=2, zero_stage=1), str(tmp_path))
    assert results[-1]["losses"] == pytest.approx(single_process["row"][0]["losses"], rel=1e-6)
    assert distance(results, single_process["row"]) < 1e-6
