"""What a report is made of, whatever it is written as: sections of text, facts, tables and figures.

Everything in them is plain data. The writers (``html``, ``markdown``) escape each string, so that a study's own words
(names, descriptions, reasons of failures) cannot become markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Code:
    """A config key, a value or a command, shown in the fixed-width face."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Words that a hasty reader should see."""

    text: str


@dataclass(frozen=True)
class Number:
    """A cell that sorts by ``value`` (None sorts last) and shows ``text``."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Badge:
    """A word with a colour: ``good``, ``bad``, ``unsure`` or ``plain``."""

    text: str
    mood: str = "plain"


Inline = str | Code | Strong | Badge | Number


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    parts: tuple[Inline, ...]


@dataclass(frozen=True)
class Bullets:
    """A list of one-line items."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The few figures that sum a study up: (label, value, remark)."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table; ``caption`` says what its rows are. ``numeric`` columns are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Inline]]
    caption: str = ""
    numeric: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, its file name without suffix, its text for those who cannot see it, and its caption.

    ``tips`` maps the gid of a drawn mark to the words shown when it is pointed at (in HTML only).
    """

    name: str
    canvas: Canvas
    alt: str
    caption: str
    tips: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Folded:
    """Something long, closed at first: a table, or a file's text."""

    summary: str
    content: Table | Code


Block = Text | Bullets | Facts | Table | Figure | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; ``anchor`` is its name in links."""

    title: str
    anchor: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report of one study."""

    title: str
    question: str
    badges: tuple[Badge, ...]
    sections: tuple[Section, ...]
    footer: str
