"""Batch arithmetic, against a brute-force reference over small sizes."""

from __future__ import annotations

import itertools

import pytest

from megadit.config import LoadedConfig, RunConfig, merge_ds_config
from megadit.config.deepspeed.batch import BatchPlan, BatchSize, plan_batch
from megadit.errors import UserError


def size(value: int | None, key: str = "k") -> BatchSize | None:
    return None if value is None else BatchSize(value, key, "in a file")


def plan(world: int, total: int | None, micro: int | None, steps: int | None, default: int, default_micro: int | None):
    return plan_batch(
        world,
        global_batch=size(total, "train_batch_size"),
        micro_batch=size(micro, "train_micro_batch_size_per_gpu"),
        accumulation=size(steps, "gradient_accumulation_steps"),
        default_global=BatchSize(default, "train.global_batch", "a default"),
        default_micro=default_micro,
    )


def possible(world: int, total: int | None, micro: int | None, steps: int | None, default: int) -> list[BatchPlan]:
    """Every plan with the given sizes, by trying all; the default global batch stands unless two sizes replace it."""
    if total is None and not (micro and steps):
        total = default
    sizes = range(1, 65)
    return [
        BatchPlan(m * a * world, m, a)
        for m, a in itertools.product([micro] if micro else sizes, [steps] if steps else sizes)
        if total is None or m * a * world == total
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_combination_agrees_with_trying_all(world: int):
    totals, micros, steps = (None, 6, 16, 24, 48), (None, 1, 3, 4, 8), (None, 1, 2, 5)
    outcomes = {True: 0, False: 0}
    for total, micro, accumulation, default_micro in itertools.product(totals, micros, steps, (None, 3, 4, 100)):
        plans = possible(world, total, micro, accumulation, default=48)
        outcomes[bool(plans)] += 1
        if not plans:
            with pytest.raises(UserError):
                plan(world, total, micro, accumulation, 48, default_micro)
            continue
        batch_plan = plan(world, total, micro, accumulation, 48, default_micro)
        assert batch_plan in plans
        if micro is None and accumulation is None:
            limit = default_micro or batch_plan.global_batch
            assert batch_plan.micro_batch == max(p.micro_batch for p in plans if p.micro_batch <= limit)
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(
    ("world", "total", "micro", "steps", "message"),
    [
        (
            2,
            256,
            4,
            8,
            "train_batch_size: 256 (in a file) is not train_micro_batch_size_per_gpu: 4 (in a file) times "
            "gradient_accumulation_steps: 8 (in a file) times 2 processes, which is 64; change one of them",
        ),
        (
            8,
            None,
            None,
            None,
            "train.global_batch: 100 (a default) is not a multiple of 8 processes; the nearest possible are 96 and 104",
        ),
        (
            1,
            None,
            48,
            None,
            "train.global_batch: 100 (a default) is not a multiple of train_micro_batch_size_per_gpu: "
            "48 (in a file) times 1 process; the nearest possible are 96 and 144",
        ),
        (
            64,
            None,
            4,
            None,
            "train.global_batch: 100 (a default) is not a multiple of train_micro_batch_size_per_gpu: "
            "4 (in a file) times 64 processes; the nearest possible is 256",
        ),
        (
            2,
            30,
            None,
            4,
            "train_batch_size: 30 (in a file) is not a multiple of gradient_accumulation_steps: "
            "4 (in a file) times 2 processes; the nearest possible are 24 and 32",
        ),
    ],
)
def test_sentences(world: int, total: int | None, micro: int | None, steps: int | None, message: str):
    with pytest.raises(UserError) as error:
        plan(world, total, micro, steps, 100, None)
    assert str(error.value) == message


def test_the_users_keys_are_named_as_they_wrote_them():
    config = RunConfig.model_validate(
        {"model": {"width": 64, "heads": 4}, "train": {"steps": 1, "global_batch": 100, "micro_batch": 8}}
    )
    mine = LoadedConfig(config, {"train.global_batch": "c.yaml", "train.micro_batch": "an override"}, "c.yaml")
    with pytest.raises(UserError) as error:
        merge_ds_config(mine, None, 4)
    assert str(error.value) == (
        "train.global_batch: 100 (in c.yaml) is not a multiple of train.micro_batch: 8 (in an override) times "
        "4 processes; the nearest possible are 96 and 128"
    )


def test_a_default_micro_batch_gives_way():
    config = RunConfig.model_validate(
        {"model": {"width": 64, "heads": 4}, "train": {"steps": 1, "global_batch": 64, "micro_batch": 32}}
    )
    merged = merge_ds_config(LoadedConfig(config), None, 8)
    assert (merged.config.train.micro_batch, merged.ds_config["gradient_accumulation_steps"]) == (8, 1)
