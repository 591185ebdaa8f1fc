"""Layouts that cannot work are refused in one sentence that names the nearest ones that can."""

import itertools
import json
import re

import pytest

from helpers.training import small_config
from megadit.config import LoadedConfig, merge_ds_config
from megadit.config.deepspeed.batch import data_parallel_size
from megadit.errors import UserError

SIX = {"model": {"width": 96, "heads": 6}}


@pytest.mark.parametrize(
    ("parallel", "sections", "sentence"),
    [
        ({"tensor": 4}, SIX, "parallel.tensor: 4 does not divide model.heads, 6; the nearest for this model: 3 or 6"),
        ({"tensor": 8}, SIX, "parallel.tensor: 8 does not divide model.heads, 6; the nearest for this model: 6"),
        ({"sequence": True}, {}, "parallel.sequence: true cuts tokens between tensor-parallel ranks, and there is one"),
        ({"pipeline": 5}, {}, "parallel.pipeline: 5 is more than the 4 stages of a model of 2 blocks; the nearest "),
        ({"pipeline": 2, "zero_stage": 0}, {}, "parallel.zero_stage: 0 does not go with parallel.pipeline 2, where"),
        ({"pipeline": 2, "zero_stage": 2}, {}, "parallel.zero_stage: 2 does not go with parallel.pipeline 2, whose"),
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
         "numbers of processes are 4 and 8"),
        ({"tensor": 2}, 1, "parallel.tensor: 2 does not divide the 1 process of this run; the nearest possible is 2, "
         "or for 1: parallel.tensor=1"),
        ({"tensor": 2, "pipeline": 2}, 6, "parallel.pipeline: 2 times parallel.tensor 2 does not divide the 6 "
         "processes of this run; the nearest possible numbers of processes are 4 and 8, or for 6: parallel.pipeline=3"),
        ({"tensor": 2, "sequence": True}, 3, "parallel.tensor: 2 does not divide the 3 processes of this run; the "
         "nearest possible numbers of processes are 2 and 4, or for 3: parallel.tensor=1 parallel.pipeline=3 "
         "parallel.sequence=false"),
        ({}, 6, "train.global_batch: 16 (a default) is not a multiple of 6 processes; the nearest possible are 12 and "
         "18, or the layout parallel.pipeline=3"),
    ],
)  # fmt: skip
def test_what_the_processes_do_not_allow(parallel, world, sentence):
    with pytest.raises(UserError) as caught:
        merge_ds_config(LoadedConfig(small_config(parallel=parallel)), None, world)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("more", [{}, {"sequence": True}, {"zero_stage": 2}], ids=str)
def test_what_is_offered_instead_is_possible(more):
    offers = set()
    for tensor, pipeline, world in itertools.product((1, 2), (1, 2, 3, 4), range(1, 14)):
        parallel = {"tensor": tensor, "pipeline": pipeline, **more}
        try:
            merge_ds_config(LoadedConfig(config := small_config(parallel=parallel)), None, world)
        except ValueError:  # by the model, whatever the number of processes
            continue
        except UserError as error:
            refused = str(error)
        else:
            continue
        if "number" in refused:
            for number in re.findall(r"\d+", refused.partition("processes are")[2].partition(",")[0]):
                merge_ds_config(LoadedConfig(config), None, int(number))
                offers.add("processes")
        if overrides := dict(re.findall(r"parallel\.(\w+)=(\w+)", refused)):
            changed = {**parallel, **{key: json.loads(value) for key, value in overrides.items()}}
            merge_ds_config(LoadedConfig(small_config(parallel=changed)), None, world)
            offers.add("layout")
    assert offers == {"processes", "layout"}


def test_one_rank_to_a_layer_is_offered_without_cut_tokens():
    parallel = {"tensor": 2, "sequence": True}
    with pytest.raises(ValueError, match=r"the nearest for this model: 1 with parallel.sequence=false or 3"):
        small_config(parallel=parallel, model={"width": 96, "heads": 3})


def test_the_batch_is_shared_by_replicas_alone():
    config = small_config(parallel={"tensor": 2, "pipeline": 2}, train={"micro_batch": 2})
    assert data_parallel_size(config, 8) == 2
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
