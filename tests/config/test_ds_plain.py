"""Dicts that a dry run takes to be DeepSpeed's without asking it are DeepSpeed's; all others are asked about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megadit.config import load
from megadit.config.deepspeed.file import KNOWN_VALID, is_known_valid
from megadit.config.deepspeed.merge import merge_ds_config
from megadit.engine.deepspeed.check import check_ds_config
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
SAMPLES = (
    False,
    True,
    0,
    1,
    2,
    3,
    7,
    0.0,
    0.5,
    2.5e8,
    "none",
    "cpu",
    "fp32",
    "bf16",
    "fp16",
    None,
    -1,
    "auto",
    "nvme",
    [],
)
BASE: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 0},
}


def plain_values(judge: Any) -> Iterator[Any]:
    """The samples that a judge takes, and for a block one dict per key and sample."""
    if isinstance(judge, Mapping):
        for key, inner in judge.items():
            yield from ({key: value} for value in plain_values(inner))
    else:
        yield from (sample for sample in SAMPLES if judge(sample))


@pytest.mark.parametrize("key", [key for key in KNOWN_VALID if key not in BASE or key == "zero_optimization"])
def test_deepspeed_takes_what_counts_as_plain(key):
    values = list(plain_values(KNOWN_VALID[key]))
    assert values, "no sample is plain: add one"
    for value in values:
        ds_config = {**BASE, key: value}
        assert is_known_valid(ds_config)
        check_ds_config(ds_config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_that_come_with_megadit_are_plain(file):
    values = json.loads(file.read_text(encoding="utf-8"))
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    assert is_known_valid(merge_ds_config(load("configs/quickstart/digits.yaml", []), {**values, **sizes}, 2).ds_config)


def test_what_megadit_makes_is_plain():
    assert is_known_valid(merge_ds_config(load("configs/quickstart/digits.yaml", []), None, 1).ds_config)
    pipeline = load("configs/quickstart/emoji.yaml", ["parallel.pipeline=2", "train.precision=bf16"])
    assert is_known_valid(merge_ds_config(pipeline, None, 4).ds_config)


@pytest.mark.parametrize(
    "odd",
    [
        {"nosuch": 1},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stage": 2, "nosuch": True}},
        {"zero_optimization": {"stage": True}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
        {"zero_optimization": 2},
        {"bf16": {"enabled": "yes"}},
        {"gradient_clipping": float("inf")},
        {"comms_logger": {"enabled": True}},
    ],
)
def test_all_others_are_asked_about(odd):
    assert not is_known_valid({**BASE, **odd})


def test_what_deepspeed_does_not_take_is_not_plain():
    for odd in ({"zero_optimization": {"stage": 2, "nosuch": True}}, {"zero_optimization": {"stage": 4}}):
        with pytest.raises(UserError, match="--ds_config: DeepSpeed does not take"):
            check_ds_config({**BASE, **odd})
