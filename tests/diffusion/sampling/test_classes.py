"""The run's class names and the choice of classes by label or name."""

from __future__ import annotations

import json

import pytest

from megadit.diffusion.sampling.classes import check_count, chosen_classes, read_classes, read_notice, resolve_classes
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


@pytest.mark.parametrize(
    "text", ["{", '"word', "3", "{}", "null", "[null]", '[["a"]]', "[" * 100_000, '["a", 7]', "[true]"]
)
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


def test_more_names_than_classes_are_refused_and_fewer_told(tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"classes\.json: has 3 names, but the model has 2 classes.*; give the run its own"
    ):
        check_count(tmp_path, NAMES, 2)
    assert chosen_classes(tmp_path, "1", 3) == ([], [1])
    write_json(tmp_path / "classes.json", NAMES)
    assert chosen_classes(tmp_path, None, 3) == (NAMES, None)
    assert chosen_classes(tmp_path, "4", 5, notes=False) == (NAMES, [4])
    assert capsys.readouterr().err == ""
    chosen_classes(tmp_path, None, 5)
    assert "classes.json has 3 names for 5 classes; the others go by their labels" in capsys.readouterr().err


IMAGENET = ["tench, Tinca tinca", "maillot", "maillot, tank suit", "tank suit", "Cat", "cat", "CAFE\u0301", " a b "]


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("maillot, tank suit", [2]),  # a whole name, though both of its parts are names
        (["maillot, tank suit", "cat,Cat", "3"], [2, 5, 4, 3]),
        ("tench, tinca TINCA", [0]),  # in another case, where its parts are no names
        ('["maillot, tank suit", 3, "cat"]', [2, 3, 5]),
        (' [1, "Cat"] ', [1, 4]),
        ("cat", [5]),
        ("Cat", [4]),
        ("CAF\u00c9", [6]),  # one code point for two
        ("caf\u00e9", [6]),
        (" a b ", [7]),
        ("a b", [7]),
        ("A B,007, 1,", [7, 7, 1]),
        (["", "1"], [1]),
    ],
)
def test_a_choice_is_a_name_a_list_or_parts(given, labels):
    assert resolve_classes(given, IMAGENET, len(IMAGENET)) == labels


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("CAT", r"CAT names 2 classes, Cat \(label 4\) and cat \(label 5\); write the name letter for letter, or"),
        ("maillot, tank suit, cat", r'"maillot, tank suit" is a class whose name has a comma; give each .* of its own'),
        ("tench, Tinca tinca,cat", r"""or all as a JSON list: --classes '\["tench, Tinca tinca", …\]'"""),
        ("Maillot, Tank Suit", "whose name has a comma"),
        ('["CAT"]', "CAT names 2 classes"),
        ('["7"]', "7 is not a class of this model"),
        ("[8]", "8 is not a label of this model; labels are 0 to 7"),
        ("[-1]", "-1 is not a label"),
        ("[1.0]", r"1\.0 in the list is no class; write names in double quotes"),
        ("[true]", "in the list is no class"),
        ("[null]", "in the list is no class"),
        ('[["cat"]]', "in the list is no class"),
        ("[cat]", "begins as a JSON list, but has the word cat without quotes"),
        ("[1", "begins as a JSON list, but"),
        ("[]", "is empty"),
        ("[" * 100_000, "nested too deeply"),
        ("\u0663", "not a class of this model; labels are written with the digits 0 to 9"),  # Arabic-Indic 3
        ("\uff13", "digits 0 to 9"),  # full width 3
        ("+3", r"\+3 is not a class"),
        ("1_0", "1_0 is not a class"),
        ("9" * 5000, "not a label of this model"),
        ("mailot", r"did you mean maillot\?"),
        ("cat\nmaillot", r"cat\\nmaillot"),
    ],
)
def test_what_may_mean_several_or_nothing_is_refused(given, sentence):
    with pytest.raises(UserError, match=f"^--classes: .*{sentence}") as caught:
        resolve_classes(given, IMAGENET, len(IMAGENET))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_class_may_be_called_like_a_list():
    assert resolve_classes("[1]", ["a", "b", "[1]"], 3) == [2]


def test_classes_of_one_name_or_of_none_go_by_their_labels():
    names = ["cat", "dog", "cat", "", "e\u0301", "\u00e9"]
    with pytest.raises(UserError, match=r"cat names 2 classes, cat \(label 0\) and cat \(label 2\).*--classes '\[0\]'"):
        resolve_classes("cat", names, 6)
    assert resolve_classes('[2, ""]', names, 6) == [2, 3]
    assert resolve_classes(["e\u0301", "\u00e9"], names, 6) == [4, 5]
    with pytest.raises(UserError, match="names 2 classes"):
        resolve_classes("\u00c9", names, 6)


class TestNumbersAsNames:
    def test_digits_are_their_own_labels(self):
        digits = [str(number) for number in range(10)]
        assert resolve_classes("7,0", digits, 10) == [7, 0]
        assert resolve_classes('[7, "3"]', digits, 10) == [7, 3]

    def test_a_number_that_is_a_name_and_another_label_is_refused(self):
        names = ["9", "a", "b", "2"]
        with pytest.raises(UserError, match=r"2 is the name of label 3, and a label itself, called b; write") as caught:
            resolve_classes("2", names, 4)
        assert """--classes '["2"]' for the name, or --classes '[2]' for the label""" in str(caught.value)
        assert resolve_classes('["2", 2]', names, 4) == [3, 2]
        assert resolve_classes("9,1", names, 4) == [0, 1]  # 9 is no label, and label 1 is called by no number

    def test_a_label_that_is_called_by_another_number_is_refused(self):
        """Of digits 7 and 2, as data.classes has them, 1 is label 1, which is called 2."""
        with pytest.raises(UserError, match=r"1 is a label, called 2, and the name of no class.*--classes '\[1\]' for"):
            resolve_classes("1", ["7", "2"], 2)
        assert resolve_classes("7,2", ["7", "2"], 2) == [0, 1]
        assert resolve_classes("[1]", ["7", "2"], 2) == [1]


def test_a_thousand_labels_take_no_time():
    names = [f"name {number}, also {number}, and so on" for number in range(1000)]
    assert resolve_classes(",".join(map(str, range(1000))), names, 1000) == list(range(1000))
