"""A report as markdown, its figures as PNG files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megadit.search.report.blocks import (
    Badge,
    Block,
    Bullets,
    Code,
    Document,
    Facts,
    Figure,
    Folded,
    Inline,
    Number,
    Strong,
    Table,
    Text,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


def render(document: Document, plots: str = "plots") -> str:
    """The document's text; figures are linked as ``<plots>/<name>.png``."""
    lines = [f"# {escape(document.title)}", ""]
    if document.question:
        lines += [escape(document.question), ""]
    lines += [" · ".join(_inline(badge) for badge in document.badges), ""]
    for section in document.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, plots), ""]
    lines += ["---", "", escape(document.footer), ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """``text`` as words on one line: nothing in it is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span; backticks inside make its fence longer, and a pipe is escaped since it may stand in a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _inline(part: Inline) -> str:
    if isinstance(part, Code):
        return _code(part.text) if part.text else ""
    if isinstance(part, Strong | Badge):
        return f"**{escape(part.text)}**"
    return escape(part.text if isinstance(part, Number) else part)


def _block(block: Block, plots: str) -> Iterator[str]:
    match block:
        case Text():
            yield "".join(_inline(part) if not isinstance(part, str) else _words(part) for part in block.parts)
        case Bullets():
            yield from (f"- {escape(item)}" for item in block.items)
        case Facts():
            for label, value, remark in block.items:
                yield f"- {escape(label)}: **{escape(value)}**" + (f" ({escape(remark)})" if remark else "")
        case Table():
            yield from _table(block)
        case Figure():
            yield f"![{escape(block.alt)}]({plots}/{block.name}.png)"
            yield ""
            yield f"*{escape(block.caption)}*"
        case Folded():
            yield f"<details><summary>{escape(block.summary)}</summary>"
            yield ""
            if isinstance(block.content, Table):
                yield from _table(block.content)
            else:
                yield from _fenced(block.content.text)
            yield ""
            yield "</details>"


def _words(text: str) -> str:
    """Like ``escape``, but spaces at the ends stay: the neighbours are other parts of one paragraph."""
    return _SPECIAL.sub(r"\\\1", re.sub(r"\s+", " ", text))


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield escape(table.caption)
        yield ""
    yield "| " + " | ".join(escape(column) for column in table.columns) + " |"
    yield "|" + "|".join("--:" if column in table.numeric else "---" for column in table.columns) + "|"
    for row in table.rows:
        yield "| " + " | ".join(_inline(cell) for cell in row) + " |"


def _fenced(text: str) -> Iterator[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    yield f"{fence}yaml"
    yield text.rstrip("\n")
    yield fence
