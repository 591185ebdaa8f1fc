"""What a resumed run is told of its changed config: rates with numbers, averages, and the rest in one sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from helpers.training import small_config
from megadit.checkpoint.format import Position
from megadit.engine.schedule import Schedule
from megadit.train.resume import config_notes, group_notes, rate_text

COSINE = {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 0}
WSD = {"lr": 2e-3, "schedule": "wsd", "warmup_steps": 0, "decay_steps": "20%"}


def notes(old, new, step=500, images=None, total=None):
    """Of a run that stored the sections ``old`` at ``step`` and goes on with ``new``."""
    before, after = small_config(**old), small_config(**new)
    state = {} if images is None else {"data": {"training_images": images}}
    config = json.loads(json.dumps(before.model_dump(mode="json")))
    stored = SimpleNamespace(config=config, state=state, position=Position(step, 16 * step))
    return config_notes(stored, after, total or after.train.steps)


def run(optim, steps, **train):
    return {"optim": optim, "train": {"steps": steps, **train}}


def test_nothing_changed_nothing_said():
    assert notes(run(COSINE, 1000), run(COSINE, 1000)) == []
    assert (
        notes(run({**WSD, "warmup_steps": 50}, 1000), run({**WSD, "warmup_steps": "5%", "decay_steps": 200}, 1000))
        == []
    )


def test_a_lengthened_cosine_says_from_which_rate_to_which():
    (note,) = notes(run(COSINE, 1000), run(COSINE, 2000))
    before, after = (
        2e-3 * Schedule.from_config(small_config(**run(COSINE, n)).optim, n).factor(500) for n in (1000, 2000)
    )
    assert (rate_text(before), rate_text(after)) == ("1.00e-3", "1.71e-3")
    assert note == (
        "the learning rate goes from 1.00e-3 to 1.71e-3 at step 500 (train.steps 1000 → 2000 lengthens the cosine)"
    )
    (note,) = notes(run(COSINE, 1000), run(COSINE, 800))
    assert note.endswith("(train.steps 1000 → 800 shortens the cosine)") and "from 1.00e-3 to 6.17e-4" in note


def test_a_finished_run_that_goes_on_begins_at_its_last_rate():
    (note,) = notes(run(COSINE, 1000), run(COSINE, 2000), step=1000)
    assert note.startswith("the learning rate goes from 4.93e-9 to 1.00e-3 at step 1000 (train.steps")


def test_a_finished_run_whose_rate_does_not_jump_is_told_its_length_alone():
    assert notes(run(WSD, 3), run(WSD, 4), step=3) == [
        "the config has changed since the checkpoint: train.steps 3 → 4"
    ]  # the rate of its last update is that of the next one


def test_groups_of_one_name_are_told_apart_by_their_order():
    def rows(*decays):
        names = ("hidden", "finite", "finite")
        return [
            {"name": n, "lr_mult": 1.0, "wd_mult": wd, "eps_mult": 1.0} for n, wd in zip(names, decays, strict=True)
        ]

    assert group_notes(rows(2.0, 1.0, 0.0), rows(2.0, 1.0, 0.0)) == []
    assert group_notes(rows(2.0, 1.0, 0.0), rows(4.0, 1.0, 1.0)) == [
        "group hidden has wd_mult 4 from the config (checkpoint: 2.0)",
        "group finite has wd_mult 1 from the config (checkpoint: 0.0)",
    ]
    assert len(group_notes(rows(2.0, 1.0, 0.0)[:2], rows(2.0, 1.0, 0.0))) == 3


@pytest.mark.parametrize(
    ("old", "new", "cause", "rates"),
    [
        (COSINE, {**COSINE, "lr": 1e-3}, "optim.lr 0.002 → 0.001", "1.00e-3 to 5.00e-4"),
        (COSINE, WSD, "optim.schedule cosine → wsd, optim.decay_steps null → 20%", "1.00e-3 to 2.00e-3"),
        (COSINE, {**COSINE, "min_lr_ratio": 0.5}, "optim.min_lr_ratio 0 → 0.5", "1.00e-3 to 1.50e-3"),
        ({"lr": 2e-3}, {"lr": 2e-3, "warmup_steps": 1000}, "optim.warmup_steps 4 → 1000", "2.00e-3 to 1.00e-3"),
    ],
)
def test_every_cause_is_named_with_both_values(old, new, cause, rates):
    (note,) = notes(run(old, 1000), run(new, 1000))
    assert note == f"the learning rate goes from {rates} at step 500 ({cause})"


def test_a_course_that_parts_later_says_where():
    (note,) = notes(run(WSD, 1000), run(WSD, 2000))
    assert note == (
        "the learning rate stays at 2.00e-3 at step 500 and leaves its former course at step 801 (train.steps 1000 → "
        "2000 lengthens the schedule)"
    )
    (note,) = notes(run({"lr": 2e-3}, 1000), run({"lr": 2e-3}, 2000))
    assert note == "the config has changed since the checkpoint: train.steps 1000 → 2000"  # a constant rate goes on


def test_a_length_in_epochs_follows_the_images_of_before():
    epochs = {"steps": None, "epochs": 10.0, "global_batch": 16}
    old = {"optim": COSINE, "train": epochs}
    (note,) = notes(old, old, images=1600, total=1500)  # 1000 steps then; an accepted change of the data made it 1500
    assert note.endswith("at step 500 (the run's steps 1000 → 1500 lengthens the cosine)")
    assert notes(old, old, images=1600, total=1000) == []
    assert notes(old, old, total=1500) == []  # how long it was to be is not known


def test_averages_and_the_rest():
    old = {"ema": {"decays": (0.9,), "every": 1}, "optim": {"weight_decay": 0.05}}
    new = {"ema": {"decays": (0.9,), "every": 4}, "optim": {"weight_decay": 0.1, "betas": (0.9, 0.95)}}
    assert notes(old, new, step=7) == [
        "ema.every 1 → 4 from step 7 on: averages follow the weights every 4 updates",
        "the config has changed since the checkpoint: optim.betas [0.9, 0.99] → [0.9, 0.95], "
        "optim.weight_decay 0.05 → 0.1",
    ]
    moved = {"data": {"workers": 3, "on_change": "accept"}}
    assert notes({}, moved) == []


def test_a_config_that_is_no_longer_valid_is_told_without_rates():
    before = small_config().model_dump(mode="json")
    before["optim"]["schedule"] = "staircase"
    stored = SimpleNamespace(config=before, state={}, position=Position(5, 80))
    assert config_notes(stored, small_config(), 10) == [
        "the config has changed since the checkpoint: optim.schedule staircase → constant"
    ]
