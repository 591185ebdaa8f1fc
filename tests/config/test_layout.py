"""Layouts that cannot work are refused in one sentence that names the nearest ones that can."""

import pytest

from helpers.training import small_config
from megadit.config import LoadedConfig, merge_ds_config
from megadit.config.layout import replicas
from megadit.errors import UserError

SIX = {"model": {"width": 96, "heads": 6}}


@pytest.mark.parametrize(
    ("parallel", "sections", "sentence"),
    [
        ({"tensor": 4}, SIX, "parallel.tensor: 4 does not divide model.heads, 6; the nearest possible: 3 or 6"),
        ({"tensor": 8}, SIX, "parallel.tensor: 8 does not divide model.heads, 6; the nearest possible: 6"),
        ({"sequence": True}, {}, "parallel.sequence: true cuts tokens between tensor-parallel ranks, and there is one"),
        ({"pipeline": 5}, {}, "parallel.pipeline: 5 is more than the 4 stages of a model of 2 blocks; the nearest "),
        ({"pipeline": 2, "zero_stage": 0}, {}, "parallel.zero_stage: 0 does not go with parallel.pipeline 2, where"),
        ({"pipeline": 2, "zero_stage": 2}, {}, "parallel.zero_stage: 2 does not go with parallel.pipeline 2, whose"),
        ({"tensor": 2}, {"train": {"compile": True}}, "train.compile: true does not go with parallel.tensor 2"),
        ({"pipeline": 2}, {"train": {"compile": True}}, "train.compile: true does not go with parallel.pipeline 2"),
    ],
)
def test_what_the_model_does_not_allow(parallel, sections, sentence):
    with pytest.raises(ValueError) as caught:
        small_config(parallel=parallel, **sections)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "world", "sentence"),
    [
        ({"tensor": 2}, 5, "parallel.tensor: 2 does not divide the 5 processes of this run; the nearest possible "
         "number of processes are 4 and 6"),
        ({"tensor": 2}, 1, "parallel.tensor: 2 does not divide the 1 process of this run; the nearest possible "
         "number of processes is 2"),
        ({"tensor": 2, "pipeline": 2}, 6, "parallel.pipeline: 2 times parallel.tensor 2 does not divide the 6 "
         "processes of this run; the nearest possible number of processes are 4 and 8"),
    ],
)  # fmt: skip
def test_what_the_processes_do_not_allow(parallel, world, sentence):
    with pytest.raises(UserError) as caught:
        merge_ds_config(LoadedConfig(small_config(parallel=parallel)), None, world)
    assert str(caught.value) == sentence


def test_the_batch_is_shared_by_replicas_alone():
    config = small_config(parallel={"tensor": 2, "pipeline": 2}, train={"micro_batch": 2})
    assert replicas(config, 8) == 2
    merged = merge_ds_config(LoadedConfig(config), None, 8)
    assert merged.ds_config["gradient_accumulation_steps"] == 4
    assert merged.config.parallel.zero_stage == 1
    assert merged.ds_config["pipeline"]["pipe_partitioned"] is False
    with pytest.raises(UserError, match="2 data-parallel replicas of 4 processes each"):
        loaded = LoadedConfig(config.model_copy(), {"train.global_batch": "a test"})
        merge_ds_config(loaded, {"train_micro_batch_size_per_gpu": 3}, 8)


def test_a_pipeline_is_fed_in_small_pieces():
    config = small_config(parallel={"pipeline": 2}, train={"global_batch": 64})
    merged = merge_ds_config(LoadedConfig(config), None, 4)
    assert merged.ds_config["gradient_accumulation_steps"] == 8
    assert merged.ds_config["train_micro_batch_size_per_gpu"] == 4
