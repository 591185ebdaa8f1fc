"""Files of prompts as editors and shells write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.diffusion.sampling.prompts import check_prompts, read_prompts
from megadit.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompt_a_line_whatever_the_encoding_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(end.join([" größte ", "", "a\u2028b\u0085c\x0bd", "last"]).encode(encoding))
    assert read_prompts(path) == ["größte", "a\u2028b\u0085c\x0bd", "last"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"one\ncaf\xe9\n", r"is not a text file \(line 2 has the byte 0xe9, which is not UTF-8\); save it as UTF-8"),
        (b"\xff\xfe", "holds no prompt"),
        (b" \r\n\t\n", "holds no prompt"),
    ],
)
def test_what_holds_no_prompt(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_prompts(tmp_path / "x")
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)


def test_a_prompt_of_another_encoding_is_refused_before_a_tokenizer_sees_it() -> None:
    check_prompts(["größte", "😀"])
    with pytest.raises(UserError, match=r"^--prompt: 'caf\\udce9' is not UTF-8; write it into a file"):
        check_prompts(["a", "caf\udce9"])
