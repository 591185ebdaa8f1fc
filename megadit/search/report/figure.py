"""What all figures of a report share: a quiet look, axes of hyperparameters, marks that tell their values."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup

from megadit.files.text import plain_label
from megadit.search.report.importance import spans_decades
from megadit.search.report.points import Gathered, Point, point_tip
from megadit.search.wording import value_text

INK, SOFT = "#1c2430", "#566173"
DIVERGED = "#b3261e"
CHOSEN = "#d97706"
_MARKERS = "os^DvPX*"
_TICKS = 9
_PIXELS_PER_INCH = 108


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, its file name without suffix, its text for those who cannot see it, and its caption.

    ``tips`` maps the gid of a drawn mark to the words shown when it is pointed at (in HTML only).
    """

    name: str
    canvas: Any
    alt: str
    caption: str
    tips: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def svg(self) -> Markup:
        """The figure as an ``<svg>`` element that can stand in a page beside others.

        Letters stay letters, so that they can be found and read aloud. Identities get the figure's name as a prefix,
        since those of two figures would be one in a page, and what only a file needs is dropped.
        """
        import matplotlib

        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.canvas.savefig(buffer, format="svg", metadata=nothing)
        text = buffer.getvalue()
        text = re.sub(r'\s+xmlns(?::xlink)?="[^"]*"', "", text[text.index("<svg") :])
        tipped = Markup('<g id="{}" data-tip="{}">')
        text = re.sub(r'<g id="(mark\d+)">', lambda mark: tipped.format(mark[1], self.tips[mark[1]]), text)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        width = round(_PIXELS_PER_INCH * self.canvas.get_figwidth())
        head = Markup('<svg role="img" aria-label="{}" style="max-width:{}px"').format(self.alt, width)
        return Markup(text.replace("<svg", head, 1))


def new_canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained", facecolor="white")


def dress(panel: Any, title: str = "") -> None:
    """The common look of a panel."""
    panel.grid(color="#dde2ea", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(SOFT)
    panel.tick_params(which="both", colors=SOFT, labelsize=8)
    if title:
        panel.set_title(plain_label(title), fontsize=10, color=INK, loc="left", fontweight="bold")


@dataclass(frozen=True)
class ValueAxis:
    """Positions of the values of one key: log2 where factors matter, the value itself, or its place in a list.

    ``values`` are distinct, and ascending where they are numbers; ``own_ticks``: they are the ticks.
    """

    key: str
    kind: str  # log | linear | listed
    values: tuple[Any, ...]
    own_ticks: bool

    def at(self, value: Any) -> float:
        """The position of ``value``."""
        if self.kind == "listed":
            return float(list(map(repr, self.values)).index(repr(value)))
        return math.log2(value) if self.kind == "log" else float(value)

    def part(self, value: Any) -> float:
        """The position of ``value`` as a part of the axis's length."""
        low, high = self.at(self.values[0]), self.at(self.values[-1])
        return 0.5 if low == high else (self.at(value) - low) / (high - low)

    def ticks(self) -> tuple[Any, ...]:
        """The values that get ticks: their own, or the round numbers between the ends."""
        marks = self.values if self.own_ticks else self._round()
        return marks[:: math.ceil(len(marks) / _TICKS)]

    def _round(self) -> tuple[float, ...]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = float(self.values[0]), float(self.values[-1])
        if self.kind == "log":
            marks = LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0), numticks=20).tick_values(
                low, high
            )
        else:
            marks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high)
        slack = 1e-3 * low if self.kind == "log" else 1e-9 * (high - low)
        return tuple(mark for mark in map(float, marks) if low - slack <= mark <= high + slack) or (low, high)

    @property
    def label(self) -> str:
        """The key, and how it is drawn."""
        return f"{self.key} (log)" if self.kind == "log" else self.key

    def draw(self, panel: Any, labelled: bool = True) -> None:
        """Ticks, label and range of the horizontal axis of ``panel``."""
        ticks = self.ticks()
        labels = [plain_label(value_text(tick)) for tick in ticks]
        turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if sum(map(len, labels)) > 42 else {}
        panel.set_xticks(list(map(self.at, ticks)), labels, **turned)
        low, high = self.at(self.values[0]), self.at(self.values[-1])
        margin = 0.06 * (high - low) or 0.5
        panel.set_xlim(low - margin, high + margin)
        if labelled:
            panel.set_xlabel(plain_label(self.label), fontsize=9, color=SOFT)


def value_axis(key: str, kind: str, values: Sequence[Any]) -> ValueAxis:
    """An axis for these values of ``key``, which is searched as ``kind``: grid, choice, uniform or log_uniform."""
    distinct = list({repr(value): value for value in values}.values())
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return ValueAxis(key, "listed", tuple(distinct), True)
    ordered = sorted(distinct)
    low, high = ordered[0], ordered[-1]
    if kind not in ("grid", "choice"):
        return ValueAxis(key, "log" if kind == "log_uniform" and low > 0 else "linear", tuple(ordered), False)
    # values that grow by one factor, as a grid of powers does
    powers = len(ordered) > 2 and low > 0 and np.allclose(np.diff(np.log(ordered)), math.log(ordered[1] / low), 0.02)
    return ValueAxis(key, "log" if spans_decades(low, high) or powers else "linear", tuple(ordered), True)


def axis_of(gathered: Gathered, key: str, points: Sequence[Point]) -> ValueAxis:
    """The axis of a searched key for the values that ``points`` have."""
    kind = gathered.results.study.space.dimension(key).kind
    return value_axis(key, kind, [point.hps[key] for point in points])


def score_limits(means: Sequence[float], lower_is_better: bool) -> tuple[float, float]:
    """The range of scores that a figure shows: the good part; what is far worse is drawn at the edge.

    Losses rise steeply beyond the stability edge, and a figure as high as the worst would show nothing else.
    """
    sign = 1.0 if lower_is_better else -1.0
    costs = sorted(sign * mean for mean in means)
    best = costs[0]
    far = min(costs[-1] - best, 3 * (costs[len(costs) // 2] - best)) or abs(best) * 0.05 or 1.0
    low, high = sorted((sign * (best - 0.08 * far), sign * (best + 1.12 * far)))
    return low, high


class Sheet:
    """A figure of ``points`` under construction: range of scores, looks of the scales, tips of the marks drawn so far.

    Scales are dark to light from the smallest to the largest; their markers differ, too, for those who see no colours.
    """

    def __init__(self, gathered: Gathered, points: Sequence[Point], width: float, height: float) -> None:
        import matplotlib

        self.gathered = gathered
        self.canvas = new_canvas(width, height)
        self.tips: dict[str, str] = {}
        self.limits = score_limits(gathered.means(points), gathered.lower_is_better())
        colours, last = matplotlib.colormaps["viridis"], max(len(gathered.scales) - 1, 1)
        self.colours = {scale: colours(0.82 * index / last) for index, scale in enumerate(gathered.scales)}
        self.markers = {scale: _MARKERS[index % len(_MARKERS)] for index, scale in enumerate(gathered.scales)}

    def plot(self, panel: Any, xs: Sequence[float], ys: Sequence[float], tip: str, **look: Any) -> None:
        """One mark or polyline; ``tip`` is shown when it is pointed at."""
        name = f"mark{len(self.tips)}"
        self.tips[name] = tip
        panel.plot(xs, ys, gid=name, **look)

    def mark(self, panel: Any, x: float, point: Point, **look: Any) -> None:
        """A point at its mean score; at the panel's bad end where it is far worse, and as a cross where it diverged.

        The crosses of each scale have a row of their own.
        """
        low, high = self.limits
        mean, tip = point.mean(self.gathered.score), point_tip(self.gathered, point)
        look = {"color": self.colours[point.scale], "clip_on": False, "linestyle": "none"} | look
        if mean is None:
            step = 0.045 * (high - low) * (self.gathered.scales.index(point.scale) + 0.5)
            y = high - step if self.gathered.lower_is_better() else low + step
            self.plot(
                panel, [x], [y], tip, **look | {"marker": "x", "markersize": 7, "markeredgewidth": 2.2, "zorder": 5}
            )
            return
        shown = min(max(mean, low), high)
        edge = "white" if shown == mean else DIVERGED
        look = {"marker": self.markers[point.scale], "markersize": 6, "markeredgecolor": edge, "zorder": 4} | look
        self.plot(panel, [x], [shown], tip, **look)

    def figure(self, name: str, alt: str, caption: str) -> Figure:
        """The finished figure."""
        return Figure(name, self.canvas, alt, caption, self.tips)
