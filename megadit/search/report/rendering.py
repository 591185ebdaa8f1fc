"""How a report is written: templates filled in, with every word of the study escaped for the form it goes into.

Names, descriptions and reasons of failures are a user's, so both forms escape whatever a template prints unless it is
markup that a template made: HTML by Jinja's autoescape, markdown by a filter of its own in the same place.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context
from markupsafe import Markup

from megadit.search.wording import counted, duration_text, hps_text, number_text, share_text, value_text

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


class Number(NamedTuple):
    """A cell that sorts by ``value`` (None sorts last) and shows ``text``."""

    value: float | None
    text: str

    def __str__(self) -> str:
        return self.text


def number(value: float | None, spec: str = ".4g", note: str = "") -> Number:
    """A number in a format of Python's with a ``note`` after it; a dash where there is none."""
    return Number(value, number_text(value, spec) + note)


class Badge(NamedTuple):
    """A word with a colour: ``style`` is ``good``, ``bad``, ``unsure`` or ``plain``."""

    text: str
    style: str = "plain"

    def __html__(self) -> Markup:
        return Markup('<span class="badge {}">{}</span>').format(self.style, self.text)


class Code(str):
    """A config key, a value or a command, shown in the fixed-width face."""

    def __html__(self) -> Markup:
        return Markup("<code>{}</code>").format(str(self)) if self else Markup()


TableCell = str | Number | Badge | Code


def render(form: str, values: dict[str, Any]) -> str:
    """The report as ``form``, html or md, of the values that the templates name."""
    environment = Environment(
        loader=PackageLoader("megadit.search.report"),
        autoescape=True,
        finalize=_markdown if form == "md" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    texts = (counted, duration_text, hps_text, number_text, share_text, value_text)
    environment.filters |= {text.__name__: text for text in texts}
    environment.filters |= {"code": Code, "fenced": _fenced, "markdown": _markdown, "one_line": _one_line}
    return environment.get_template("sections.j2").render(values, layout=f"report.{form}.j2")


def _one_line(text: str) -> Markup:
    return Markup(" ".join(text.split()))


@pass_eval_context  # so that constants come here as well, and not through HTML's escape when a template is compiled
def _markdown(context: object, value: object) -> Markup:
    """A printed value as words on one line; nothing in it is markup, except what a template made."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, Code):
        return _code_span(value)
    text = _SPECIAL.sub(r"\\\1", re.sub(r"\s+", " ", value.text if isinstance(value, Badge) else str(value)))
    return Markup(f"**{text}**" if isinstance(value, Badge) else text)


def _code_span(text: str) -> Markup:
    """A code span; backticks inside make its fence longer, and a pipe is escaped since it may stand in a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence, pad = "`" * (1 + _longest_run(text)), " " if "`" in text else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}" if text else "")


def _fenced(text: str) -> Markup:
    """A file's text as a block of code."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return Markup("{}yaml\n{}\n{}").format(fence, Markup(text.rstrip("\n")), fence)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
