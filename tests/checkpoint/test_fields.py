"""What index.json and state.json must hold before a checkpoint is relied on: one fault each, named by its key."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megadit.checkpoint.format import check_index, check_state, json_problem

INDEX: dict[str, Any] = {
    "format": "megadit-checkpoint",
    "version": 2,
    "block": 1 << 20,
    "files": {"fragments-00000.safetensors": {"bytes": 100, "crc32": 5}},
    "parameters": {"a": [2, 3]},
    "pieces": [
        {"kind": "weights", "name": "a", "start": 0, "stop": 6, "file": "fragments-00000.safetensors", "crc32": [1]},
        {
            "kind": "exp_avg",
            "name": "a",
            "start": 0,
            "stop": 3,
            "file": "fragments-00000.safetensors",
            "boxes": [[[0, 1], [0, 3]]],
        },
    ],
}
STATE: dict[str, Any] = {
    "step": 2,
    "samples_seen": 32,
    "skipped_steps": 0,
    "adam_step": 2,
    "loss_scale": {"cur_scale": 4.0, "last_overflow_iter": -1},
    "groups": [{"name": "a"}],
    "config": {"model": {}, "train": {}, "data": {}},
    "layout": {"ranks": 1, "zero_stage": 0},
}


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    holder: Any = values
    for part in above:
        holder = holder[part]
    holder[last] = value
    return values


def test_what_the_writer_writes_passes() -> None:
    check_index(INDEX)
    check_index({key: INDEX[key] for key in ("format", "parameters", "pieces")} | {"version": 1})
    check_state(STATE)
    check_state(STATE | {"loss_scale": {}, "samples": {"next": 3, "left_out": [[0, 1]]}, "data_changes": []})


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("parameters/a", 5, "shape of 'a' is 5"),
        ("parameters/a", [2.5, 3], "shape of 'a'"),
        ("parameters/a", [2**40, 2**40], "shape of 'a'"),
        ("block", 0, "block is 0"),
        ("block", 2**40, "block is"),
        ("files", {"../x": {"bytes": 1, "crc32": 1}}, r"file '\.\./x'"),
        ("files/fragments-00000.safetensors", {"bytes": "1", "crc32": 1}, "is no number"),
        ("pieces/0/name", "b", "piece 0 is of 'b', which is no parameter"),
        ("pieces/0/file", "../../etc/passwd", "which is no name of a file in this folder"),
        ("pieces/0/stop", 7, "has the elements 0 to 7 of 6"),
        ("pieces/0/start", -1, "has the elements -1 to 6 of 6"),
        ("pieces/0/crc32", ["x"], "checksums that are no numbers"),
        ("pieces/1/boxes", [[[0, 5], [0, 3]]], "piece 1 has boxes that do not lie in its parameter"),
        ("pieces/1/boxes", [[[0, 1]]], "piece 1 has boxes"),
        ("pieces/1", None, "piece 1 has no kind"),
    ],
)
def test_an_index_that_no_writer_wrote(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_index(changed(INDEX, path, value))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("step", "2", "step is 2"),
        ("adam_step", -1, "adam_step is -1"),
        ("config", {"model": {}}, "config has no model, train and data"),
        ("layout", [1], "layout is"),
        ("layout/ranks", 0, "layout is"),
        ("loss_scale/cur_scale", "4", "loss_scale is"),
        ("groups", {"a": 1}, "groups is no list"),
        ("data_changes", 1, "data_changes is no list"),
    ],
)
def test_a_state_that_no_writer_wrote(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_state(changed(STATE, path, value))


def test_what_is_told_of_an_error() -> None:
    assert json_problem(KeyError("pieces")) == "it has no pieces"
    assert json_problem(RecursionError("maximum recursion depth exceeded")) == "it is nested too deeply"
    assert json_problem(ValueError("x")) == "x"
