"""Typed fields of other programs' JSON: what is not of its type is refused by file, key and value."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadit.errors import UserError
from megadit.files.json_fields import Fields

WHERE = "IN: 'config.json'"


def test_values_of_their_types_are_read() -> None:
    fields = Fields(
        {"n": 28, "whole": 32.0, "x": 1, "t": "a", "f": False, "l": [1], "s": {"n": 2}, "null": None}, WHERE
    )
    assert (fields.integer("n"), fields.integer("whole"), fields.number("x"), fields.text("t")) == (28, 32, 1.0, "a")
    assert (fields.flag("f"), fields.items("l"), fields.section("s").integer("n")) == (False, [1], 2)
    assert fields.integer("null", 3, null=True) is None
    assert (fields.integer("gone", 3), fields.number("gone", None, null=True), fields.items("gone", ())) == (
        3,
        None,
        [],
    )


@pytest.mark.parametrize("value", [None, "28", True, 1.5, math.nan, math.inf, 10**400, [28], {"a": 1}, -1])
def test_no_whole_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"IN: 'config\.json' has num_layers .*, which must be .*; correct the file"):
        Fields({"num_layers": value}, WHERE).integer("num_layers", 28)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (Fields.number, None), (Fields.number, "1e-4"), (Fields.number, False), (Fields.number, math.nan),
        (Fields.number, 10**400), (Fields.text, 3), (Fields.text, None), (Fields.flag, 1), (Fields.flag, "true"),
        (Fields.items, "abc"), (Fields.items, {}), (Fields.items, None), (Fields.section, []), (Fields.section, None),
    ],
)  # fmt: skip
def test_a_value_of_another_type(read: Callable[[Fields, str], Any], value: Any) -> None:
    with pytest.raises(UserError, match="has key .*, which must be"):
        read(Fields({"key": value}, WHERE), "key")


def test_the_value_is_shown_as_the_file_has_it_and_cut_where_it_is_long() -> None:
    with pytest.raises(UserError, match="has key null, which must be given"):
        Fields({"key": None}, WHERE).integer("key")
    with pytest.raises(UserError) as error:
        Fields({"key": "x" * 10_000}, WHERE).integer("key")
    assert len(str(error.value)) < 300


def test_a_key_that_must_be_there() -> None:
    with pytest.raises(UserError, match=r"IN: 'config\.json', inner has no n; "):
        Fields({"inner": {}}, WHERE).section("inner").integer("n")


def test_keys_that_nobody_read_are_known() -> None:
    fields = Fields({"_class_name": "A", "n": 1, "other": 2, "raw": 3}, WHERE)
    fields.integer("n")
    fields.raw("raw")
    assert fields.unread() == {"other": 2}


@pytest.mark.parametrize("text", ["[1, 2]", "null", "3", '"text"', "{", "", "[" * 100_000, "\xff"])
def test_no_object_in_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"IN: '.*config\.json' "):
        Fields.of_file(file, "IN")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .*; give a pipeline folder"):
        Fields.of_file(tmp_path / "config.json", "IN", "give a pipeline folder")


def test_a_file_that_is_no_json_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)  # whose reader would wait for ever
    with pytest.raises(UserError, match=r"^IN: '.*config\.json' is no file: it is no regular file"):
        Fields.of_file(path, "IN")
    path.unlink()
    path.write_text("<html>")
    with pytest.raises(UserError, match=r"config\.json' is not JSON: it is a web page"):
        Fields.of_file(path, "IN")
    with open(path, "r+b") as file:
        file.truncate(2**40)  # of which nothing is stored
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, so that it is no JSON text to read"):
        Fields.of_file(path, "IN")


def test_a_sentence_stays_one_line_whatever_a_value_holds() -> None:
    with pytest.raises(UserError) as error:
        Fields({"a\nb": "x\n\ud800\x1b[2J"}, WHERE).integer("a\nb")
    assert str(error.value).isprintable() and "a\\nb 'x\\n\\ud800\\x1b[2J'" in str(error.value)


def test_a_number_above_a_bound() -> None:
    assert Fields({"x": 0.1}, WHERE).number("x", above=0.0) == 0.1
    with pytest.raises(UserError, match="has x 0, which must be a number above 0"):
        Fields({"x": 0}, WHERE).number("x", above=0.0)
