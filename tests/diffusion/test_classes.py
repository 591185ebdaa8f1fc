"""The run's class names and the choice of classes by label or name."""

from __future__ import annotations

import json

import pytest

from megadit.diffusion.classes import read_classes, read_notice, resolve_classes
from megadit.errors import UserError
from megadit.train.run_dir import write_json

NAMES = ["Food & Drink", "Flags", "7"]


def test_names_and_notice_are_read_from_the_run(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    (tmp_path / "DATA-NOTICE.txt").write_text("CC-BY: someone\n")
    assert read_classes(tmp_path) == NAMES
    assert read_notice(tmp_path) == "CC-BY: someone"


def test_names_of_folders_that_are_not_utf_8_come_back(tmp_path):
    write_json(tmp_path / "classes.json", ["caf\udce9", "größte"])
    assert read_classes(tmp_path) == ["caf\udce9", "größte"]
    (tmp_path / "classes.json").write_bytes(json.dumps(NAMES).encode("utf-16"))
    assert read_classes(tmp_path) == NAMES


def test_a_run_needs_neither(tmp_path):
    assert read_classes(tmp_path) == [] and read_notice(tmp_path) == ""


@pytest.mark.parametrize("text", ["{", '"word', "3", "{}", "null", "[null]", '[["a"]]', "[" * 100_000])
def test_another_content_is_refused(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        read_classes(tmp_path)


def test_labels_and_names_are_found():
    assert resolve_classes("flags, 0,FOOD & drink", NAMES, 3) == [1, 0, 0]
    assert resolve_classes("7", NAMES, 3) == [2]  # a name before a label
    assert resolve_classes("2,1", [], 3) == [2, 1]
    assert resolve_classes(None, NAMES, 3) is None


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("flag", 3, r"flag .*did you mean Flags\?"),
        ("zzz", 3, "known are Food & Drink, Flags, 7"),
        ("3", 3, "labels are 0 to 2"),
        ("-1", 3, "labels are 0 to 2"),
        (" , ", 3, "is empty"),
        ("0", 0, "unconditional"),
    ],
)
def test_wrong_choices_are_refused(text, count, message):
    with pytest.raises(UserError, match=rf"--classes: .*{message}"):
        resolve_classes(text, NAMES, count)


def test_an_unknown_name_without_names_is_told_the_labels():
    with pytest.raises(UserError, match="known are the labels 0 to 2"):
        resolve_classes("cat", [], 3)
