"""Whether data and model fit: each disagreement is one sentence that says what to set."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megadit.config import RunConfig
from megadit.data.checks import check_against_model
from megadit.data.dataset import DatasetFacts
from megadit.errors import UserError

RGB = DatasetFacts(name="emoji", channels=3, image_size=32, num_classes=9, size=100, notice="")


def run_config(model: dict[str, Any], data: dict[str, Any]) -> RunConfig:
    fields = {"width": 64, "heads": 4, "in_channels": 3, "input_size": 32, "num_classes": 9, **model}
    return RunConfig.model_validate({"model": fields, "data": data, "train": {"steps": 1}})


def test_agreement_in_pixels_and_in_latents() -> None:
    check_against_model(RGB, run_config({}, {}))
    large = dataclasses.replace(RGB, image_size=256)
    check_against_model(large, run_config({"in_channels": 4}, {"vae": {"path": "vae"}}))
    bare = dataclasses.replace(RGB, num_classes=0)
    check_against_model(bare, run_config({"num_classes": 0}, {"condition": "none"}))


@pytest.mark.parametrize(
    ("facts", "model", "data", "sentence"),
    [
        ({}, {"in_channels": 1}, {}, r"model\.in_channels: 1, but emoji has images of 3 .*set model\.in_channels=3"),
        ({}, {"input_size": 16}, {}, r"model\.input_size: 16, but data\.image_size of emoji is 32; make them equal"),
        ({}, {"num_classes": 10}, {}, r"model\.num_classes: 10, but emoji has 9 classes; set model\.num_classes=9"),
        ({}, {}, {"vae": {"path": "v"}}, r"latents of 4; set model\.input_size=4 or data\.image_size=256"),
        ({"image_size": 250}, {}, {"vae": {"path": "v"}}, r"data\.image_size: 250 is not a multiple of 8"),
        ({"channels": 1}, {}, {"vae": {"path": "v"}}, r"data\.vae: encodes RGB images, but emoji is grey"),
    ],
)
def test_disagreements(facts: dict[str, Any], model: dict[str, Any], data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_against_model(dataclasses.replace(RGB, **facts), run_config(model, data))
