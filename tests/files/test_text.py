"""Text of other people: byte order marks, line ends, names that are not UTF-8, halves of surrogate pairs."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from megadit.errors import UserError
from megadit.files.text import (
    decode,
    decode_text,
    has_lone_surrogate,
    json_bytes,
    name_bytes,
    replace_surrogates,
    split_lines,
)
from megadit.keys import stream_key


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_the_encoding_and_is_left_out(encoding: str) -> None:
    assert decode("größte\n".encode(encoding)) == "größte\n"


def test_bytes_that_are_no_text_are_named_with_their_line() -> None:
    for data, sentence in (
        ("ein\nzwei\ncafé".encode("latin-1"), " (line 3 has the byte 0xe9, which is not UTF-8); save it as UTF-8"),
        ("ein\n".encode("utf-16-le"), " (line 1 has a zero byte, as UTF-16 without its mark has); save it as UTF-8"),
        ("ab".encode("utf-16")[:-1], " (it begins as UTF-16"),
        (bytes(600), ": it is a file of zeros"),
        (b"<!DOCTYPE html>", ": it is a web page (HTML)"),
    ):
        with pytest.raises(UserError) as refused:
            decode_text(data, "--prompts: 'a.txt'")
        assert str(refused.value).startswith(f"--prompts: 'a.txt' is not a text file{sentence}")


def test_lines_end_at_line_feeds_alone() -> None:
    inside = "a\u2028b\u0085c\x0bd\x0ce\x1cf"
    assert split_lines(f"{inside}\r\n\ufeffsecond\n\n") == [inside, "second", ""]
    assert split_lines("") == [] and split_lines("one") == ["one"]


def test_names_have_the_bytes_that_the_file_system_has() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert has_lone_surrogate(name) and name_bytes(name) == b"caf\xe9.png" and name_bytes("é") == "é".encode()
    assert name_bytes("\ud800") != name_bytes("\ud801")  # of no file
    assert replace_surrogates(name) == "caf\ufffd.png" and replace_surrogates("é😀") == "é😀"


def test_json_is_written_as_it_was_for_text_and_with_escapes_for_names() -> None:
    value = {"a": "é \\ caf\udce9", "b\udcff": ["\\\udc80"]}
    data = json_bytes(json.dumps(value, ensure_ascii=False))
    assert json.loads(data) == value and "é".encode() in data and b"\\udce9" in data
    assert json_bytes('{"a": "é"}') == '{"a": "é"}'.encode()


def test_keys_of_random_streams_go_by_bytes() -> None:
    assert stream_key(0, "caf\udce9") == int.from_bytes(
        hashlib.blake2b(b"0\x1fcaf\xe9", digest_size=8).digest(), "little", signed=True
    )
    assert stream_key(0, "\ud800") != stream_key(0, "\ud801")
