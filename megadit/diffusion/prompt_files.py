"""Texts to draw, from a file of one a line. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megadit.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError if there are none, or the file is not text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: '{path}' cannot be read ({error}); give a text file of a prompt a line") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts: '{path}' holds no prompt; write one a line")
    return texts
