"""In which type gradients are added up and sent: what a DeepSpeed file says, and what megadit chooses."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.training import small_config
from megadit.config import LoadedConfig, merge_ds_config
from megadit.config.deepspeed.gradients import gradient_bytes
from megadit.errors import UserError

FP32 = {"grad_accum_dtype": "fp32"}
BF16 = {"grad_accum_dtype": "bf16"}


def merged(ds: dict[str, Any] | None = None, world: int = 2, precision: str = "bf16", micro: int = 4, **parallel: Any):
    config = small_config(parallel=parallel, train={"precision": precision, "micro_batch": micro})
    return merge_ds_config(LoadedConfig(config), ds, world)


def types(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    ds_config = merged(*args, **kwargs).ds_config
    return ds_config.get("data_types", {}).get("grad_accum_dtype"), ds_config.get("communication_data_type")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"zero_stage": 1}, ("fp32", "fp32")),
        ({"pipeline": 2}, ("fp32", "fp32")),
        ({"pipeline": 2, "micro": 16}, ("fp32", "fp32")),
        ({"zero_stage": 2}, ("fp32", None)),  # each micro batch is sent
        ({"zero_stage": 3}, ("fp32", None)),
        ({"zero_stage": 1, "micro": 8}, (None, None)),  # one micro batch
        ({"zero_stage": 1, "precision": "fp32"}, (None, None)),
        ({"zero_stage": 1, "precision": "fp16"}, (None, None)),
    ],
    ids=str,
)
def test_sums_of_several_micro_batches_are_float32_under_bf16(layout, expected):
    assert types(**layout) == expected
    assert merged(**layout).warnings == ()


@pytest.mark.parametrize(
    ("ds", "expected"),
    [
        ({"data_types": FP32}, ("fp32", "fp32")),
        ({"data_types": {"grad_accum_dtype": "auto"}, "communication_data_type": "auto"}, ("fp32", "fp32")),
        ({"communication_data_type": "bf16"}, ("fp32", "bf16")),
        ({"data_types": FP32, "communication_data_type": "bf16"}, ("fp32", "bf16")),
    ],
    ids=str,
)
def test_the_file_decides_without_a_word(ds, expected):
    assert types(ds) == expected
    assert merged(ds).warnings == ()


def test_sums_in_sixteen_bits_are_a_choice_that_is_told():
    assert types({"data_types": BF16}) == ("bf16", None)
    [warning] = merged({"data_types": BF16}).warnings
    assert warning.startswith("data_types.grad_accum_dtype: bf16 adds up the gradients of 2 micro batches in 16 bits")
    assert merged({"data_types": BF16}, micro=8).warnings == ()  # nothing is added up


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "half"), ("fp16", "bf16"), ("fp32", "bf16")])
def test_sums_do_not_round_to_another_type_than_the_gradients(precision, dtype):
    with pytest.raises(UserError) as caught:
        merged({"data_types": {"grad_accum_dtype": dtype}}, precision=precision)
    assert f"grad_accum_dtype: {dtype} would round the gradients of train.precision: {precision}" in str(caught.value)
    assert merged({"data_types": FP32}, precision=precision).warnings == ()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, (4, 4)),
        ({"zero_stage": 2}, (4, 2)),
        ({"ds": {"data_types": BF16}}, (2, 2)),
        ({"ds": {"communication_data_type": "bf16"}}, (4, 2)),
        ({"micro": 8}, (2, 2)),
        ({"precision": "fp32"}, (4, 4)),
        ({"precision": "fp16"}, (2, 2)),
    ],
    ids=str,
)
def test_bytes_of_an_element(layout, expected):
    assert gradient_bytes(merged(**layout).ds_config, layout.get("precision", "bf16")) == expected
