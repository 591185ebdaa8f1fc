"""Warm-up and decay as steps or shares: what is taken, kept as it was written, and refused in one sentence."""

from __future__ import annotations

import json

import pytest

from megadit.config import LoadedConfig, RunConfig, load_config, merge_ds_config, replace, save_config
from megadit.errors import UserError
from megadit.search.study.space import build_space
from megadit.search.study.spec import DimensionSpec

EMOJI = "quickstart/emoji.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [("5%", "5%"), ("'2.5%'", "2.5%"), ("0%", "0%"), ("100%", "100%"), ("12", 12), ("1e3", 1000), ("2^5", 32)],
)
def test_what_is_written_stays_as_it_is(text, value, tmp_path):
    config = load_config(EMOJI, [f"optim.warmup_steps={text}"])
    assert config.optim.warmup_steps == value
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config == replace(config, {})
    assert RunConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


@pytest.mark.parametrize("key", ["optim.warmup_steps", "optim.decay_steps"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("150%", "'150%' is no share of the run, which lies between 0% and 100%; write 5%"),
        ("-1%", "'-1%' is no share of the run, which lies between 0% and 100%; write 5%"),
        ("5 %", "'5 %' is not written as a share of the run; write 5%"),
        (".5%", "'.5%' is not written as a share of the run; write 0.5%"),
        ("0.05", "0.05 is not a whole number of steps; write a share of the run as 5%"),
        ("1.5", "1.5 is not a whole number of steps; write a share of the run as 5%"),
        ("soon", "'soon' is neither steps nor a share of the run; write 100 or 5%"),
        ("1.2.3%", "'1.2.3%' is neither steps nor a share of the run; write 100 or 5%"),
        ("true", "true is neither steps nor a share of the run; write 100 or 5%"),
        ("[5%]", "['5%'] is neither steps nor a share of the run; write 100 or 5%"),
    ],
)
def test_what_is_no_length_is_one_sentence(key, text, said):
    with pytest.raises(UserError) as refusal:
        load_config(EMOJI, [f"{key}={text}"])
    assert str(refusal.value) == f"{key}: {said} (in an override)"


def test_limits_of_the_two():
    for key, text in (("warmup_steps", "-1"), ("decay_steps", "0"), ("decay_steps", "0%"), ("warmup_steps", "null")):
        with pytest.raises(UserError, match=rf"^optim\.{key}: .*; write [^\n]*$"):
            load_config(EMOJI, [f"optim.{key}={text}"])
    assert load_config(EMOJI, ["optim.decay_steps=null"]).optim.decay_steps is None


def test_a_share_gives_way_to_a_deepspeed_scheduler_as_steps_do():
    loaded = LoadedConfig(load_config(EMOJI, ["optim.decay_steps=null", "optim.schedule=constant"]))
    ds = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30}}}
    assert merge_ds_config(loaded, ds, 1).config.optim.warmup_steps == 30
    loaded = LoadedConfig(loaded.config, {"optim.warmup_steps": "an override"})
    with pytest.raises(UserError, match="5%"):
        merge_ds_config(loaded, ds, 1)


def test_a_study_searches_steps_or_lists_shares():
    spec = {"optim.warmup_steps": DimensionSpec.model_validate({"grid": ("5%", 10)})}
    assert build_space(spec).grid() == [{"optim.warmup_steps": "5%"}, {"optim.warmup_steps": 10}]
    ranged = {"optim.warmup_steps": DimensionSpec.model_validate({"uniform": (1, 9)})}
    assert {type(point["optim.warmup_steps"]) for point in build_space(ranged).random(5, 0)} == {int}
