"""REPA in training: every layout gives the plain torch run, what is reported, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layouts.parity import WEIGHT_TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, merge_weights, small_config, train_on, train_rank
from megadit.conditioning import Conditioning
from megadit.config import LoadedConfig, RunConfig
from megadit.data import BatchLayout, SampleOrder, build_datasets, make_batch
from megadit.data.features.targets import TargetFeatures
from megadit.diffusion import build_objective
from megadit.engine.schedule import Schedule
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup.groups import param_groups
from megadit.plan import forward_flops

STEPS = 4
TOLERANCE = 2e-5


def repa_config(**sections: dict[str, Any]) -> RunConfig:
    """Four 2 x 2 features of digits on 4 x 4 tokens, drawn at weight .5 after block 1."""
    base: dict[str, dict[str, Any]] = {
        "model": {"repa": {"block": 1, "feature_dim": 112, "hidden": 48}},
        "objective": {"kind": "flow", "repa_weight": 0.5},
        "data": {"name": "digits", "features": {"image_size": 32}},
        "optim": {"clip": {"value": None}},
    }
    return small_config(**{name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}})


def plain_run(config: RunConfig) -> dict[str, Any]:
    """The same training written out: one process, no DeepSpeed, the loss of REPA in float64."""
    train_set, _ = build_datasets(config.data)
    seed, size = config.train.seed, config.train.global_batch
    layout, order = BatchLayout(size, 1, 0, size), SampleOrder(len(train_set), seed)
    model = build_model(config.model, seed=seed)
    optimizer = torch.optim.AdamW(param_groups(model, config.optim), betas=config.optim.betas)
    schedule = Schedule.from_config(config.optim, config.train.steps or STEPS)
    objective = build_objective(config.objective, learn_sigma=False, num_classes=10)
    assert config.data.features is not None
    targets = TargetFeatures(config.data.features, side=4)
    losses, repas = [], []
    for step in range(STEPS):
        batch = make_batch(train_set, order, layout.numbers(step, 0), seed=seed, flip=False)
        noisy = objective.prepare(batch.images, Conditioning(labels=batch.labels), batch.numbers, seed)
        output, [tokens] = model(noisy.x, noisy.t, noisy.cond, taps=(1,))
        projected, target = model.repa(tokens).double(), targets.of(batch).double()  # type: ignore[misc]
        cosine = (projected * target).sum(-1) / (projected.norm(dim=-1) * target.norm(dim=-1))
        loss = objective.loss(output, noisy).total.mean().double() - 0.5 * cosine.mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = schedule.factor(step) * config.optim.lr * group["lr_mult"]
        optimizer.step()
        losses.append(loss.item())
        repas.append(-cosine.mean().item())
    weights = {name: p.detach().flatten() for name, p in model.named_parameters()}
    return {"losses": losses, "repas": repas, "weights": weights}


def assert_same(results: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    for result in results:
        torch.testing.assert_close(result["losses"], plain["losses"], rtol=TOLERANCE, atol=0.0)
    weights = merge_weights(results)
    for name, expected in plain["weights"].items():
        gap = (weights[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        if name.endswith("qkv.bias"):  # a key bias has no gradient in exact arithmetic
            query, _, value = (weights[name] - expected).chunk(3)
            gap = torch.cat([query, value]).norm() / expected.norm()
        assert gap <= WEIGHT_TOLERANCE, f"{name}: {gap:.2e}"


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return plain_run(repa_config())


LAYOUTS = [(1, 0, 16, "none"), (2, 1, 8, "none"), (2, 2, 4, "selective"), (2, 3, 4, "full")]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage", "micro", "recompute"), LAYOUTS)
def test_layouts_equal_plain_torch(
    plain: dict[str, Any], tmp_path: Path, world: int, stage: int, micro: int, recompute: str
) -> None:
    train = {"micro_batch": micro, "activation_checkpointing": recompute}
    config = repa_config(parallel={"zero_stage": stage}, train=train, ema={"decays": (0.5,)})
    results = run_ranks(world, train_rank, config, str(tmp_path), STEPS)
    assert_same(results, plain)
    averages = merge_weights(results, "ema/0.5")
    assert averages["repa.fc1.weight"].isfinite().all()


@pytest.mark.distributed
def test_a_normed_projector_equals_plain_torch_at_zero_3(tmp_path: Path) -> None:
    repa = {"block": 1, "feature_dim": 112, "hidden": 48, "norm": "rms"}
    config = repa_config(model={"repa": repa}, parallel={"zero_stage": 3}, train={"micro_batch": 4})
    results = run_ranks(2, train_rank, config, str(tmp_path), STEPS)
    plain = plain_run(config)
    assert_same(results, plain)
    assert (plain["weights"]["repa.norm.weight"] != 1).any()  # the gain learns


@pytest.mark.distributed
def test_a_checkpoint_holds_the_projector(plain: dict[str, Any], tmp_path: Path) -> None:
    config = repa_config()
    half = run_ranks(1, train_rank, config, str(tmp_path), 2)
    resumed = run_ranks(2, train_rank, config, str(tmp_path), STEPS, half[0]["saved"])
    for result in resumed:
        result["losses"] = half[0]["losses"] + result["losses"]
    assert_same(resumed, plain)


def records_of(config: RunConfig, folder: str) -> dict[str, Any]:
    from megadit.train.validation import validation_losses

    run = assemble_rank(config, folder)
    records = train_on(run, 2)
    return {"records": records, "val": validation_losses(run), "ema": validation_losses(run, "0.5")}


@pytest.mark.distributed
def test_what_is_reported(plain: dict[str, Any], tmp_path: Path) -> None:
    config = repa_config(train={"validation_images": 20}, ema={"decays": (0.5,)})
    one, two = (run_ranks(world, records_of, config, str(tmp_path / str(world)))[0] for world in (1, 2))
    for row, loss, repa in zip(one["records"], plain["losses"], plain["repas"], strict=False):
        assert row["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert row["loss_repa"] == pytest.approx(repa, abs=1e-5)
        assert row["loss"] == pytest.approx(row["loss_mse"] + 0.5 * row["loss_repa"], rel=1e-6)
    assert set(one["val"]) == {"loss", "repa"} and -1 <= one["val"]["repa"] <= 1
    assert one["val"]["loss"] > 0.5  # the objective's own: not lowered by the part that the weight scales
    assert one["ema"]["loss"] != one["val"]["loss"]
    for name, value in two["val"].items():
        assert value == pytest.approx(one["val"][name], rel=1e-4)


@pytest.mark.distributed
def test_bf16(tmp_path: Path) -> None:
    config = repa_config(train={"precision": "bf16"}, parallel={"zero_stage": 1})
    result = run_ranks(1, train_rank, config, str(tmp_path), STEPS)[0]
    assert all(math.isfinite(loss) for loss in result["losses"])


def check(config: RunConfig, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from megadit.train.prepare import check_job

    monkeypatch.setenv("WORLD_SIZE", "1")
    check_job(LoadedConfig(config), None, folder, "auto")


def test_the_command_refuses_other_channels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(repa_config(), monkeypatch, tmp_path)
    wrong = repa_config(model={"repa": {"block": 1, "feature_dim": 768}})
    with pytest.raises(UserError, match="set model.repa.feature_dim=112"):
        check(wrong, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"repa": None}}, "repa_weight: 0.5, but the model has no projector"),
        ({"data": {"features": None}}, "repa_weight: 0.5, but there are no target features"),
        ({"objective": {"repa_weight": 0.0}}, "repa_weight: 0, but the model has a projector, which nothing would"),
        ({"model": {"repa": {"block": 3}}}, "repa.block: 3 is not one of the model's 2 blocks"),
    ],
    ids=["no-projector", "no-features", "no-weight", "block"],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        repa_config(**sections)


def test_flops_count_the_projector() -> None:
    with_it, without = (forward_flops(repa_config().model.model_copy(update=u)) for u in ({}, {"repa": None}))
    assert with_it - without == 2 * 16 * (32 * 48 + 48 * 48 + 48 * 112)
