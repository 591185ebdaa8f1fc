"""A matplotlib figure as SVG that can stand inside an HTML page beside others."""

from __future__ import annotations

import io
import re
from html import escape

from megadit.search.report.blocks import Figure

_PIXELS_PER_INCH = 108
_HEAD = re.compile(r"\A.*?(?=<svg\b)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_NAMESPACES = re.compile(r'\s+xmlns(?::xlink)?="[^"]*"')
_IDENTITY = re.compile(r'(\bid="|url\(#|href="#)')
_MARK = re.compile(r'<g id="([^"]+)">')


def inline_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element with a text alternative and the tips of its marks.

    Letters stay letters, so that they can be found and read aloud. Identities get the figure's name as a prefix, since
    those of two figures would be one in a page, and the file's declarations, which only a file needs, are dropped.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name}):
        figure.canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = _METADATA.sub("", _HEAD.sub("", buffer.getvalue()))
    text = _NAMESPACES.sub("", text)
    text = _MARK.sub(lambda mark: _with_tip(mark.group(1), figure.tips.get(mark.group(1))), text)
    text = _IDENTITY.sub(lambda found: f"{found.group(1)}{figure.name}-", text)
    width = round(_PIXELS_PER_INCH * figure.canvas.get_figwidth())
    head = f'<svg role="img" aria-label="{escape(figure.alt)}" style="max-width:{width}px"'
    return text.replace("<svg", head, 1)


def _with_tip(identity: str, tip: str | None) -> str:
    return f'<g id="{identity}">' if tip is None else f'<g id="{identity}" data-tip="{escape(tip)}">'
