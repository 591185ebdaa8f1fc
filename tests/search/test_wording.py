"""Hyperparameters for people: as short as they can be, and what a study file would take."""

from __future__ import annotations

import pytest

from megadit.config.schema.values import parse_number
from megadit.search.wording import point_text, value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0**-7, "2^-7"), (0.125, "2^-3"), (0.25, "0.25"), (0.3, "0.3"), (1.0, "1"), (46, "46"), (1234567, "1234567"),
        ("cosine", "cosine"), (False, "false"), (None, "null"), (1e-10, "1e-10"), (0.000123456, "0.0001235"),
        (12345.0, "12345"), (0.0, "0"), ([2, 4], "[2, 4]"),
    ],
)  # fmt: skip
def test_values(value, text):
    assert value_text(value) == text


def test_a_point_can_be_copied_onto_a_command_line():
    point = {"optim.lr": 2.0**-8, "optim.clip.value": 0.0123456, "optim.warmup_steps": 1200000}
    text = point_text(point)
    assert text == "optim.lr=2^-8 optim.clip.value=0.0123456 optim.warmup_steps=1200000"
    assert [parse_number(word.partition("=")[2]) for word in text.split()] == list(point.values())
