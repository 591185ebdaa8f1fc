"""Labels of other people: what is a class, and how a wrong number is named before it makes billions of them."""

from __future__ import annotations

import pytest

from megadit.data.labels import class_names_of_numbers, label_of, number_labels
from megadit.errors import UserError


def where(i: int) -> str:
    return f"line {i + 1} of x.jsonl"


def test_numbers_are_kept_and_names_are_sorted() -> None:
    assert number_labels([3, 1, 1], where) == (("0", "1", "2", "3"), [3, 1, 1])
    assert number_labels(["b", "a", "b"], where) == (("a", "b"), [1, 0, 1])
    assert number_labels([], where) == ((), []) == (class_names_of_numbers([], where), [])


def test_a_part_of_a_large_set_names_classes_without_an_image() -> None:
    assert len(class_names_of_numbers([21_840, 0], where)) == 21_841  # of two images of ImageNet-21k
    assert len(class_names_of_numbers([199_999], where, 200_000)) == 200_000  # as the model says
    assert len(class_names_of_numbers(range(150_000), where)) == 150_000  # as many labels


@pytest.mark.parametrize(
    ("numbers", "num_classes", "sentence"),
    [
        ([0, 1, 4294967295], None, r"line 3 of x\.jsonl has the label 4294967295, .* of 3 labels; correct the label"),
        ([0, 4294967295, 1], 10, r"line 2 of x\.jsonl has the label 4294967295, but model\.num_classes is 10; correct"),
        ([0, 10], 10, r"line 2 .* label 10, but model\.num_classes is 10; .* or set model\.num_classes=11$"),
        ([2**31 - 1], 2**31, r"line 1 .* label 2147483647"),
        ([5, 2**70], None, r"line 2 .* label 1180591620717411303424,"),
        ([5, 10**5000], None, r"line 2 .* label a number of more than 64 bits"),
        ([5, -1, -1], 10, r"line 2 .* label -1; number classes from 0"),
    ],
)
def test_a_number_that_cannot_be_is_named_with_its_line(
    numbers: list[int], num_classes: int | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.path: .*{sentence}") as caught:
        class_names_of_numbers(numbers, where, num_classes)
    assert "set model.num_classes=4294967296" not in str(caught.value)  # no remedy that cannot work


def test_names_beside_numbers_are_refused_with_both_lines() -> None:
    with pytest.raises(UserError, match=r"line 2 of .* name '3' as label, and line 1 of .* the number 3; use one"):
        number_labels([3, "3", "4", 5], where)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3.0, r"not 3\.0; write 3$"),
        (2.5, r"not 2\.5; give a text"),
        (float("nan"), "not nan; give"),
        (float("inf"), "not inf; give"),
        (True, "not true; give"),
        (None, "not null; give"),
        ([1], r"not \[1\]; give"),
        ("  ", "not '  '; give"),
    ],
)
def test_what_is_no_label(value: object, words: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.path: {where(6)}: label must be .*{words}"):
        label_of(value, where(6))


def test_a_name_with_half_a_surrogate_pair_or_a_nul_is_refused() -> None:
    assert label_of("größte 😀", where(6)) == "größte 😀"
    with pytest.raises(UserError, match=r"line 7 of x\.jsonl: the label 'a\\ud83d' holds half a surrogate pair"):
        label_of("a\ud83d", where(6))
    with pytest.raises(UserError, match=r"the label 'a\\x00' holds a NUL"):
        label_of("a\0", where(6))
