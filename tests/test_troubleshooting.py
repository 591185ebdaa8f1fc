"""docs/troubleshooting.md quotes messages that the code really says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
WINDOW = 3  # words that must stand together in the code as on the page


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables, headers and rules left out."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "message"]


def messages() -> list[str]:
    """What stands between backticks in the first column, escaped single characters left out."""
    quoted = [message for row in rows() for message in re.findall(r"`([^`]+)`", row[0])]
    return [message for message in quoted if not message.startswith("\\")]


@functools.cache
def said() -> str:
    """Every text in the sources, one a line, with an ellipsis where a value is filled in."""
    texts: list[str] = []
    for folder in ("megadit", "launch", "tools", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                    texts.append(node.value if isinstance(node.value, str) else node.value.decode("utf-8", "replace"))
    return "\n".join(" ".join(text.split()) for text in texts)


def share_said(message: str) -> float:
    """Share of a message's words that stand in the code beside the same neighbours."""
    words = message.split()
    if len(words) <= WINDOW:
        return float(message in said())
    known = [False] * len(words)
    for start in range(len(words) - WINDOW + 1):
        if " ".join(words[start : start + WINDOW]) in said():
            known[start : start + WINDOW] = [True] * WINDOW
    return sum(known) / len(words)


def test_every_row_has_a_message_a_cause_and_a_remedy() -> None:
    assert rows()
    for row in rows():
        assert len(row) == 3 and all(row), row
        assert "`" in row[0], f"no message is quoted: {row[0]}"


@pytest.mark.parametrize("message", messages())
def test_the_code_says_it(message: str) -> None:
    assert share_said(message) >= 0.5, f"{share_said(message):.0%} of the words are in the code: {message}"


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert share_said("optim.lr: 3 is far too blue for a Tuesday; paint it") < 0.5
