"""The hunt finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from helpers import fuzz
from helpers.fuzz import QUICK, OverTime, hunt, mutated, odd_json
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
JSON = [{"steps": 1000, "name": "linear", "ends": [0.1, 0.2]}]


def _whole(data: bytes) -> None:
    """A reader as there were many: it takes each value for what it should be."""
    try:
        values = json.loads(data)
    except ValueError:
        raise UserError("it is no JSON; copy it again") from None
    int(values["steps"])


def _once(data: bytes) -> None:
    """A reader whose fault needs one certain byte."""
    if b"\xff" in data:
        raise RuntimeError("unreachable")


def _endless(data: bytes) -> None:
    while True:
        pass


def _greedy(data: bytes) -> None:
    assert len(bytearray(b"\1") * 2**26) == 2**26


def _silent(data: bytes) -> None:
    raise UserError(" ")


@pytest.mark.parametrize(
    ("read", "raised"),
    [
        (_whole, (KeyError, TypeError, ValueError, RecursionError, AttributeError)),
        (_once, RuntimeError),
        (_endless, OverTime),
        (_greedy, AssertionError),
        (_silent, AssertionError),
    ],
)
def test_a_planted_fault_is_found(
    read: Callable[[bytes], object], raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MOST_S", 0.2)
    monkeypatch.setattr(fuzz, "MOST_BYTES", 2**25)
    with pytest.raises(raised):
        hunt(QUICK, st.one_of(odd_json(JSON), mutated([b"a sound file"])), read)


def test_known_files_come_first() -> None:
    seen = []
    with pytest.raises(ZeroDivisionError):
        hunt(QUICK, st.just(b""), lambda data: seen.append(data) or 1 // len(data), known=[b"a", b""])
    assert seen == [b"a", b""]


def test_a_refusal_is_no_fault() -> None:
    def read(data: bytes) -> None:
        raise UserError("it is wrong; mend it")

    hunt(QUICK, st.binary(), read)
