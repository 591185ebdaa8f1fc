"""A report as one self-contained HTML page: no network, figures as inline SVG, tables that sort when asked."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

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
from megadit.search.report.style import CSS, SCRIPT
from megadit.search.report.svg import inline_svg

_WIDE = 24  # letters above which a fact takes two places


def render(document: Document) -> str:
    """The page. It needs nothing beside itself and asks nothing of any server, which its content policy also says."""
    body = "".join(
        f'<section id="{escape(section.anchor)}"><h2>{escape(section.title)}</h2>'
        f"{''.join(_block(block) for block in section.blocks)}</section>\n"
        for section in document.sections
    )
    links = "".join(f'<a href="#{escape(s.anchor)}">{escape(s.title)}</a>' for s in document.sections)
    badges = " ".join(_inline(badge) for badge in document.badges)
    question = f"<p class=question>{escape(document.question)}</p>" if document.question else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(document.title)}</title><style>{CSS}</style></head>\n"
        f"<body><header><h1>{escape(document.title)}</h1>{question}<p class=badges>{badges}</p></header>\n"
        f'<nav aria-label="Sections">{links}</nav>\n<main>\n{body}</main>\n'
        f"<footer>{escape(document.footer)}</footer><div id=tip role=status hidden></div>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _inline(part: Inline) -> str:
    match part:
        case Code():
            return f"<code>{escape(part.text)}</code>" if part.text else ""
        case Strong():
            return f"<strong>{escape(part.text)}</strong>"
        case Badge():
            return f'<span class="badge {escape(part.mood)}">{escape(part.text)}</span>'
        case Number():
            return escape(part.text)
        case _:
            return escape(part)


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p>{''.join(_inline(part) for part in block.parts)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
        case Facts():
            return f"<dl class=facts>{''.join(_tile(*item) for item in block.items)}</dl>"
        case Table():
            return "".join(_table(block))
        case Figure():
            return f"<figure>{inline_svg(block)}<figcaption>{escape(block.caption)}</figcaption></figure>"
        case Folded():
            content = block.content
            inner = "".join(_table(content)) if isinstance(content, Table) else f"<pre>{escape(content.text)}</pre>"
            return f"<details><summary>{escape(block.summary)}</summary>{inner}</details>"


def _tile(label: str, value: str, remark: str) -> str:
    wide = " class=wide" if len(value) > _WIDE else ""
    return f"<div{wide}><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"


def _table(table: Table) -> Iterator[str]:
    right = [column in table.numeric for column in table.columns]
    # Wide tables scroll inside their own frame; it takes the focus so that the keyboard can scroll it, too.
    name = escape(table.caption or ", ".join(table.columns))
    if table.caption:
        yield f"<p class=caption>{escape(table.caption)}</p>"
    yield f'<div class=scroll tabindex=0 role=region aria-label="{name}"><table aria-label="{name}">'
    yield "<thead><tr>"
    for column, flush in zip(table.columns, right, strict=True):
        yield f"<th scope=col{' class=n' if flush else ''}><button type=button>{escape(column)}</button></th>"
    yield "</tr></thead><tbody>"
    for row in table.rows:
        yield "<tr>"
        for cell, flush in zip(row, right, strict=True):
            key = ""
            if isinstance(cell, Number):
                key = f' data-v="{"" if cell.value is None else repr(float(cell.value))}"'
            yield f"<td{' class=n' if flush else ''}{key}>{_inline(cell)}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"
