"""Texts to draw, from a file of one a line. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megadit.errors import UserError
from megadit.files.file_kind import text_instead
from megadit.files.text import decode, has_half_pair, split_lines, why_no_text


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; a line ends at \\n, \\r\\n or, in files of old, \\r.

    Raises UserError if there are none, or the file is not text.
    """
    remedy = "give a text file of a prompt a line"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts: '{path}' cannot be read ({error.strerror or error}); {remedy}") from error
    other = text_instead(data)
    if other is not None:
        raise UserError(f"--prompts: '{path}' holds no prompts: {other}")
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts: '{path}' is not a text file ({why_no_text(error)}); save it as UTF-8") from error
    lines = split_lines(text.replace("\r\n", "\n").replace("\r", "\n"))
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts: '{path}' holds no prompt; write one a line")
    return texts


def check_prompts(texts: Sequence[str]) -> None:
    """Raise UserError for a ``--prompt`` that is not UTF-8, as a terminal of another encoding may give it."""
    strange = next((text for text in texts if has_half_pair(text)), None)
    if strange is not None:
        raise UserError(f"--prompt: {strange[:60]!r} is not UTF-8; write it into a file in UTF-8 for --prompts FILE")
