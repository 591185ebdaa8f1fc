"""What a study's storage says of a trial is held against what is written there, before tables are made of it."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.studies.handwritten import a_trial
from megadit.search.storage.identity import WorkerId
from megadit.search.storage.records import check_start, restored, stored

RESULT = stored(a_trial(3, 0.5, horizons={100: {"loss": 0.6}, 200: {"loss": None}}))
WORKER = WorkerId("host", "place", 5, "1").to_json()
START: dict[str, Any] = {
    "number": 3,
    "key": "k",
    "variant": "",
    "scale": None,
    "hps": {"optim.lr": 1.0},
    "seed": 0,
    "attempt": 1,
    "worker": WORKER,
    "result": RESULT,
}


def test_what_was_stored_passes() -> None:
    check_start(START)
    check_start({key: value for key, value in START.items() if key not in ("worker", "result")})
    assert restored(RESULT) == a_trial(3, 0.5, horizons={100: {"loss": 0.6}, 200: {"loss": None}})


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
    ],
)
def test_a_start_that_nobody_stored(key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"trial|is no object|worker|WorkerId"):
        check_start({**START, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outcome", "won"),
        ("scores", []),
        ("scores", {"loss": "x"}),
        ("scores", {"loss": True}),
        ("horizons", {"x": {}}),
        ("horizons", {"100": 1}),
        ("steps", 1.5),
        ("seconds", None),
        ("flops", "1"),
        ("parameters", None),
        ("novel", 1),
    ],
)
def test_a_result_that_nobody_stored(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="trial 3"):
        check_start({**START, "result": {**RESULT, key: value}})
