"""Members of tars that are something else than their name says: each is named, with what lies there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from megadit.data.shards.members import read_array, read_json, read_picture, read_text
from megadit.errors import UserError

READERS: dict[str, Callable[..., Any]] = {
    "picture": lambda data, where: read_picture(data, 3, 8, where),
    "array": read_array,
    "json": read_json,
    "text": read_text,
}
KINDS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 27\n": "it is a git-LFS pointer; run `git lfs",
    b"<!DOCTYPE html>\n<html><body>Sign in": r"it is a web page \(HTML\); fetch the file itself",
}


@pytest.mark.parametrize("data", KINDS, ids=["pointer", "page"])
@pytest.mark.parametrize("reader", READERS)
def test_a_member_that_is_something_else(reader: str, data: bytes) -> None:
    read = partial(READERS[reader], data, "'a.x' in 'b.tar'")
    with pytest.raises(UserError, match=KINDS[data]) as caught:
        read()
    assert "'a.x' in 'b.tar'" in str(caught.value) and str(caught.value).endswith("write the shard again")


def test_a_picture_that_is_cut_off_and_a_caption_with_marks() -> None:
    with pytest.raises(UserError, match="it is cut off: the mark of a picture's end is missing"):
        read_picture(b"\x89PNG\r\n\x1a\n" + bytes(60), 3, 8, "a.png")
    assert read_text(b"<b>bold</b> \n", "a.txt") == "<b>bold</b>"
