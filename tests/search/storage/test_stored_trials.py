"""What a study's storage says of a trial is held against what is written there, before tables are made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from helpers.studies.handwritten import a_trial
from megadit.search.storage.identity import WorkerId
from megadit.search.storage.records import TrialAttempt

TRIAL = a_trial(3, 0.5, scale=64, horizons={100: {"loss": 0.6}, 200: {"loss": None}})
RESULT: dict[str, Any] = json.loads(json.dumps(asdict(TRIAL)))
WORKER = asdict(WorkerId("host", "place", 5, "1"))
ATTRIBUTES: dict[str, Any] = {
    "number": 3,
    "key": "k",
    "variant": "",
    "scale": None,
    "hps": {"optim.lr": 1.0},
    "seed": 0,
    "attempt": 2,
    "worker": WORKER,
    "result": RESULT,
}


def attempt_with(attributes: dict[str, Any]) -> TrialAttempt:
    return TrialAttempt.of(create_trial(state=TrialState.FAIL, user_attrs=attributes))


def test_what_was_stored_is_read_back() -> None:
    attempt = attempt_with(ATTRIBUTES)
    assert attempt.result == TRIAL and type(attempt.result.scale) is int
    assert attempt.worker == WorkerId("host", "place", 5, "1") and (attempt.number, attempt.attempt) == (3, 2)
    enqueued = {key: value for key, value in ATTRIBUTES.items() if key not in ("worker", "result")}
    assert attempt_with(enqueued).attributes(2) == enqueued and attempt_with(enqueued).is_lost


def test_attributes_of_other_programs_and_results_without_a_scale_are_read() -> None:
    without = {key: value for key, value in RESULT.items() if key != "scale"}
    result = attempt_with({**ATTRIBUTES, "note": "x", "result": without}).result
    assert result is not None and result.scale is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", "3"),
        ("variant", None),
        ("scale", "64"),
        ("hps", []),
        ("seed", True),
        ("lost", 1),
        ("result", "x"),
        ("worker", {"host": "h"}),
        ("worker", {**WORKER, "pid": "../self"}),
        ("worker", {**WORKER, "novel": 1}),
    ],
)
def test_attributes_that_nobody_stored(key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^trial .*: ({key}|place|pid|lost|novel): |mapping"):
        attempt_with({**ATTRIBUTES, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outcome", "won"),
        ("scores", []),
        ("scores", {"loss": "x"}),
        ("scores", {"loss": True}),
        ("horizons", {"x": {}}),
        ("horizons", {"100": 1}),
        ("horizons", []),
        ("horizons", {"1_0": {}}),
        ("horizons", {" 5": {}}),
        ("horizons", {"-5": {}}),
        ("steps", 1.5),
        ("seconds", None),
        ("flops", "1"),
        ("parameters", None),
        ("novel", 1),
    ],
)
def test_a_result_that_nobody_stored(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^trial 3: {key}\b"):
        attempt_with({**ATTRIBUTES, "result": {**RESULT, key: value}})


@pytest.mark.parametrize("key", sorted(RESULT.keys() - {"scale"}))
def test_a_result_that_lacks_a_value(key: str) -> None:
    result = {name: value for name, value in RESULT.items() if name != key}
    with pytest.raises(ValueError, match=rf"^trial .*: (result: lacks {key}|{key}: Field required)$"):
        attempt_with({**ATTRIBUTES, "result": result})


def test_attributes_of_other_programs_do_not_stand_for_optunas_fields() -> None:
    other = {"params": {"x": 1}, "state": "RUNNING", "trial_id": "x", "started": 5}
    attempt = attempt_with({**ATTRIBUTES, **other})
    assert (attempt.params, attempt.state, attempt.trial_id) == ({}, "FAIL", attempt_with(ATTRIBUTES).trial_id)
