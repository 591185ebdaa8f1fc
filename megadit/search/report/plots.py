"""The figures of a report: score against one hyperparameter, importance, slices, parallel coordinates.

All have one style, axes of hyperparameters, and marks with tooltips. A function that draws one returns None where no
point has a score.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from megadit.files.text import plain_label
from megadit.search.report.data import ReportData
from megadit.search.report.importance import spans_decades
from megadit.search.results import ScoredPoint
from megadit.search.wording import counted, hps_text, number_text, value_text

INK, SOFT = "#1c2430", "#566173"
DIVERGED = "#b3261e"
CHOSEN = "#d97706"
_STYLE: Any = {
    "axes.axisbelow": True, "axes.edgecolor": SOFT, "axes.grid": True, "axes.labelsize": 9, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.titlesize": 10,
    "axes.titleweight": "bold", "figure.constrained_layout.use": True, "grid.color": "#dde2ea", "grid.linewidth": 0.7,
    "legend.fontsize": 8, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "megadit",
    "xtick.color": SOFT, "xtick.labelsize": 8, "ytick.color": SOFT, "ytick.labelsize": 8,
}  # fmt: skip
_MARKERS = "os^DvPX*"
_MAX_TICKS = 9
_ACROSS = 4  # panels in a row
_PIXELS_PER_INCH = 108


def figure_style() -> contextlib.AbstractContextManager[None]:
    """The style of a report's figures, to draw and to save them in."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, its file name without suffix, its text for those who cannot see it, and its caption.

    ``tooltips`` maps the gid of a drawn mark to its title, which a browser shows when it is pointed at.
    """

    name: str
    canvas: Any
    alt: str
    caption: str
    tooltips: Mapping[str, str] = field(default_factory=dict)

    def save(self, target: Any, **options: Any) -> None:
        """Write it as matplotlib's ``savefig`` does, in the style of all; the same figure gives the same bytes."""
        with figure_style():
            self.canvas.savefig(target, **options)

    @property
    def width(self) -> int:
        """Pixels beyond which a page does not stretch it."""
        return round(_PIXELS_PER_INCH * self.canvas.get_figwidth())

    @cached_property
    def svg(self) -> Markup:
        """An ``<svg>`` element that can stand in a page beside others: ids begin with the name of the figure."""
        buffer = io.StringIO()
        self.save(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        _, element, content = buffer.getvalue().partition("<svg")  # without the XML declaration
        content = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", content)
        mark = rf'<g id="{re.escape(self.name)}-(mark\d+)">'
        return Markup(
            element + re.sub(mark, lambda group: f"{group[0]}<title>{escape(self.tooltips[group[1]])}</title>", content)
        )


def new_canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height))


@dataclass(frozen=True)
class ValueAxis:
    """The axis of one key: logarithmic where factors matter, linear, or a list of values at 0, 1, 2 ...

    ``values`` are distinct, and ascending where they are numbers; ``own_ticks``: they are the ticks.
    """

    key: str
    kind: str  # log | linear | listed
    values: tuple[Any, ...]
    own_ticks: bool

    def at(self, value: Any) -> float:
        """The coordinate of ``value``."""
        return float(list(map(repr, self.values)).index(repr(value)) if self.kind == "listed" else value)

    @property
    def label(self) -> str:
        """The key, and how it is drawn."""
        return plain_label(f"{self.key} (log)" if self.kind == "log" else self.key)

    def draw(self, axis: Any) -> None:
        """Scale and ticks of a panel's ``xaxis`` or ``yaxis``: its own values, or round numbers between the ends."""
        from matplotlib import ticker

        if self.kind == "log":
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        if self.own_ticks:
            ticks = self.values[:: math.ceil(len(self.values) / _MAX_TICKS)]
            labels = [plain_label(value_text(tick)) for tick in ticks]
            turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if sum(map(len, labels)) > 42 else {}
            axis.set_ticks(list(map(self.at, ticks)), labels, **turned)
        else:
            wide = self.values[-1] > 1000 * self.values[0]
            log = ticker.LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=20)
            axis.set_major_locator(log if self.kind == "log" else ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(lambda tick, _: value_text(float(tick)))
        axis.minorticks_off()


def value_axis(key: str, kind: str, values: Sequence[Any]) -> ValueAxis:
    """An axis for these values of ``key``, which is searched as ``kind``: grid, choice, uniform or log_uniform."""
    distinct = list({repr(value): value for value in values}.values())
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return ValueAxis(key, "listed", tuple(distinct), True)
    ordered = sorted(distinct)
    low, high = ordered[0], ordered[-1]
    if kind not in ("grid", "choice") and low < high:
        return ValueAxis(key, "log" if kind == "log_uniform" and low > 0 else "linear", tuple(ordered), False)
    # values that grow by one factor, as a grid of powers does
    powers = len(ordered) > 2 and low > 0 and np.allclose(np.diff(np.log(ordered)), math.log(ordered[1] / low), 0.02)
    return ValueAxis(key, "log" if spans_decades(low, high) or powers else "linear", tuple(ordered), True)


def axis_of(data: ReportData, key: str, points: Sequence[ScoredPoint]) -> ValueAxis:
    """The axis of a searched key for the values that ``points`` have."""
    return value_axis(key, data.results.study.space.dimension(key).kind, [point.hps[key] for point in points])


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


class FigureBuilder:
    """A figure of ``points`` under construction: range of scores, looks of the scales, tooltips of the marks so far.

    Scales are dark to light from the smallest to the largest; their markers differ, too, for those who see no colours.
    """

    def __init__(self, data: ReportData, points: Sequence[ScoredPoint], width: float, height: float) -> None:
        import matplotlib

        self.data = data
        self.canvas = new_canvas(width, height)
        self.tooltips: dict[str, str] = {}
        self.limits = score_limits(data.means(points), data.sign > 0)
        self.worst = self.limits[1] if data.sign > 0 else self.limits[0]
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.82, max(len(data.scales), 2)))
        looks = zip(data.scales, map(tuple, colours), itertools.cycle(_MARKERS), strict=False)
        self.looks: dict[float, Any] = {scale: {"color": colour, "marker": marker} for scale, colour, marker in looks}

    def plot(self, panel: Any, xs: Sequence[float], ys: Sequence[float], tooltip: str, **look: Any) -> None:
        """One mark or polyline; ``tooltip`` is shown when it is pointed at."""
        gid = f"mark{len(self.tooltips)}"
        self.tooltips[gid] = tooltip
        panel.plot(xs, ys, gid=gid, **look)

    def mark(self, panel: Any, x: float, point: ScoredPoint, **look: Any) -> None:
        """A point at its mean score; at the panel's bad end where it is far worse, and as a cross where it diverged.

        The crosses of each scale have a row of their own.
        """
        low, high = self.limits
        mean = point.mean(self.data.score)
        look = self.looks[point.scale] | {"clip_on": False, "linestyle": "none"} | look
        if mean is None:
            y = self.worst - self.data.sign * 0.045 * (high - low) * (self.data.scales.index(point.scale) + 0.5)
            look |= {"marker": "x", "markersize": 7, "markeredgewidth": 2.2, "zorder": 5}
        else:
            y = min(max(mean, low), high)
            edge = "white" if y == mean else DIVERGED
            look = {"markersize": 6, "markeredgecolor": edge, "zorder": 4} | look
        self.plot(panel, [x], [y], self.data.tooltip(point), **look)

    def figure(self, name: str, alt: str, caption: str, variant: str = "") -> Figure:
        """The finished figure, of ``variant`` alone where one is named."""
        if variant:
            name, caption = f"{name}-{variant}", f"Variant {variant}. {caption}"
        return Figure(name, self.canvas, alt, caption, self.tooltips)


def curve_figure(data: ReportData, key: str) -> Figure | None:
    """Score against ``key``, best over the other searched keys: a panel per variant, a curve per scale value.

    Below the curves, where a verdict located the optimum of each scale, the optimum against scale: its slope is the
    drift. None if no point has a score.
    """
    variants = data.variants
    curves = {(v, s): _best_by_value(data, data.of(v, s), key) for v in variants for s in data.scales}
    points = [point for curve in curves.values() for point in curve]
    if not data.means(points):
        return None
    axis = axis_of(data, key, points)
    judged = {variant: verdict.scales for (variant, of), verdict in data.verdicts.items() if of == key}
    optima = {variant: [scale for scale in scales if scale.optimum] for variant, scales in judged.items()}
    below = any(optima.values()) and axis.kind == "log"
    width = 4.2 + 4.6 * (len(variants) - 1) + (1.2 if data.scale_word else 0)
    builder = FigureBuilder(data, points, width, 5.4 if below else 3.9)
    heights = [3, 1.1] if below else [1]
    panels = builder.canvas.subplots(
        len(heights), len(variants), squeeze=False, height_ratios=heights, sharex=True, sharey="row"
    )
    for panel, variant in zip(panels[0], variants, strict=True):
        panel.set_title(plain_label(variant))
        for scale in data.scales:
            _draw_curve(builder, panel, axis, curves[variant, scale])
    axis.draw(panels[0][0].xaxis)
    # fixed here: the intervals of the optima may be wider than what was searched
    panels[0][0].set(xlim=panels[0][0].get_xlim(), ylim=builder.limits, ylabel=plain_label(data.score))
    if below:
        panels[1][0].set(ylabel=data.scale_word)
        for panel, variant in zip(panels[1], variants, strict=True):
            _draw_optima(builder, panel, optima.get(variant, []))
    for panel in panels[-1]:
        panel.set_xlabel(axis.label, color=SOFT)
    _draw_legend(builder)
    caption = (
        f"Mean {data.score} over seeds against {key}; dots are single seeds, stars the best value of each curve, "
        "crosses values at which a run diverged. Scores far from the best are drawn at the edge."
    )
    if len(data.keys) > 1:
        caption += " At each value the best over the other searched keys."
    if below:
        caption += " Below: the fitted optimum of each curve with its 95 % interval; its slope is the drift."
    return builder.figure(f"curves-{key}", _curves_alt(data, key, curves), caption)


def _best_by_value(data: ReportData, points: Sequence[ScoredPoint], key: str) -> list[ScoredPoint]:
    """Per value of ``key`` the best point over the other keys; one that diverged only where all did."""
    by_value: dict[str, list[ScoredPoint]] = {}
    for point in points:
        by_value.setdefault(repr(point.hps[key]), []).append(point)
    return [(data.ranked(group) or group)[0] for group in by_value.values()]


def _draw_curve(builder: FigureBuilder, panel: Any, axis: ValueAxis, curve: Sequence[ScoredPoint]) -> None:
    """The points of one scale, the best as a star; a line through those with a score; their seeds as dots."""
    score = builder.data.score
    points = sorted(((axis.at(point.hps[axis.key]), point) for point in curve), key=lambda placed: placed[0])
    scored = [(x, point) for x, point in points if point.mean(score) is not None]
    if scored:
        look = {"color": builder.looks[curve[0].scale]["color"]}
        if axis.kind != "listed":
            panel.plot([x for x, _ in scored], [point.mean(score) for _, point in scored], "-", linewidth=1.6, **look)
        seeds = [(x, value) for x, point in scored for value in point.scores(score)]
        panel.plot(*zip(*seeds, strict=True), ".", markersize=4, alpha=0.45, **look)
    best = builder.data.ranked(curve)[:1]
    for x, point in points:
        builder.mark(panel, x, point, **({"marker": "*", "markersize": 13} if point in best else {}))


def _draw_optima(builder: FigureBuilder, panel: Any, located: Sequence[Any]) -> None:
    """Scale upwards, optimum with its interval across: a vertical line is transfer. ``located``: ScaleVerdicts."""
    scales = builder.data.scales
    for each in located:
        at, (low, high) = each.optimum.at, each.optimum.interval
        tooltip = f"{builder.data.scale_name(each.scale)}: optimum {2.0**at:.3g} (log2 {at:.2f}), "
        tooltip += f"95 % interval of log2 {low:.2f} to {high:.2f}\n{each.why}"
        look = builder.looks[each.scale]
        wide = {"marker": "", "linewidth": 3, "solid_capstyle": "round", "alpha": 0.55}
        builder.plot(panel, [2.0**low, 2.0**high], [each.scale] * 2, tooltip, **look | wide)
        mark = {"markersize": 7, "markeredgecolor": "white", "zorder": 4}
        builder.plot(panel, [2.0**at], [each.scale], tooltip, **look | mark)
    panel.plot([2.0**s.optimum.at for s in located], [s.scale for s in located], ":", color=SOFT, linewidth=1, zorder=1)
    panel.set_yscale("log", base=2)
    panel.set_yticks(scales, [f"{scale:g}" for scale in scales])
    margin = max(scales[-1] / scales[0], 2.0) ** 0.25
    panel.set_ylim(scales[0] / margin, scales[-1] * margin)


def _draw_legend(builder: FigureBuilder) -> None:
    from matplotlib.lines import Line2D

    scales = builder.looks if builder.data.scale_word else {}
    lines = [Line2D([], [], label=builder.data.scale_name(scale), **look) for scale, look in scales.items()]
    grey: dict[str, Any] = {"color": SOFT, "linestyle": "none"}
    lines.append(Line2D([], [], marker="*", markersize=11, label="best", **grey))
    lines.append(Line2D([], [], marker=".", alpha=0.6, label="one seed", **grey))
    lines.append(Line2D([], [], marker="x", markeredgewidth=2, label="diverged", **grey))
    builder.canvas.legend(handles=lines, loc="outside right center")


def _curves_alt(data: ReportData, key: str, curves: Mapping[tuple[str, float], Sequence[ScoredPoint]]) -> str:
    sentences = []
    for (variant, scale), points in curves.items():
        if not points:
            continue
        text = " ".join(filter(None, (variant, data.scale_name(scale)))) or "all runs"
        if best := data.ranked(points)[:1]:
            text += f" best at {value_text(best[0].hps[key])} with {number_text(best[0].mean(data.score))}"
        else:
            text += " without a best point"
        diverged = len(points) - len(data.means(points))
        sentences.append(text + (f", {counted(diverged, 'value')} diverged" if diverged else ""))
    return f"{data.score} against {key}. " + "; ".join(sentences) + "."


def importance_figure(data: ReportData) -> Figure | None:
    """Which keys decide at the proxy: bars of the shares, and the control's as a line; bars below it are noise."""
    importance = data.importance
    if isinstance(importance, str):
        return None
    control = importance.control
    canvas = new_canvas(7.2, 0.9 + 0.38 * len(importance.shares))
    panel = canvas.subplots()
    names, shares = zip(*reversed(importance.shares), strict=True)
    colours = ["#2563a8" if share > control else "#b8c2d1" for share in shares]
    bars = panel.barh(names, shares, color=colours, height=0.62)
    panel.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], padding=4, fontsize=8)
    panel.axvline(control, color=DIVERGED, linestyle="--", linewidth=1.2)
    panel.text(control, 1.0, " control", transform=panel.get_xaxis_transform(), va="bottom", fontsize=8, color=DIVERGED)
    panel.grid(False, axis="y")
    panel.set(xlim=(0, max(*shares, control) * 1.15), xlabel="share of what the forest explains of the score's rank")
    listed = ", ".join(f"{name} {100 * share:.0f} percent" for name, share in importance.shares)
    caption = (
        f"Functional ANOVA of a random forest on the ranks of {importance.points} points' scores"
        + (f"; the {importance.diverged} that diverged share the worst rank" if importance.diverged else "")
        + ". The dashed line is what a made-up hyperparameter of random values gets: shorter bars are noise."
    )
    return Figure("importance", canvas, f"Importance: {listed}; control {100 * control:.0f} percent.", caption)


def slice_figure(data: ReportData, variant: str) -> Figure | None:
    """Score against each searched key in turn, every point in each panel; None if no point has a score."""
    points = data.of(variant)
    known = len(data.means(points))
    if not known:
        return None
    across = min(_ACROSS, len(data.keys))
    rows = math.ceil(len(data.keys) / across)
    builder = FigureBuilder(data, points, 2.9 * across + (1.1 if data.scale_word else 0), 2.9 * rows + 0.2)
    panels = builder.canvas.subplots(rows, across, squeeze=False, sharey=True)
    best = data.ranked([point for point in points if point.scale == data.proxy])[:1]
    star = {"marker": "*", "color": CHOSEN, "markersize": 15, "zorder": 5}
    for key, panel in zip(data.keys, panels.flat, strict=False):
        axis = axis_of(data, key, points)
        for point in points:
            look = {"alpha": 0.75} if point.mean(data.score) is not None else {"color": DIVERGED}
            builder.mark(panel, axis.at(point.hps[key]), point, **(star if point in best else look))
        axis.draw(panel.xaxis)
        panel.set_xlabel(axis.label, color=SOFT)
    for spare in panels.flat[len(data.keys) :]:
        spare.set_axis_off()
    for panel in panels[:, 0]:
        panel.set(ylim=builder.limits, ylabel=plain_label(data.score))
    alt = f"{data.score} against each of {', '.join(data.keys)}: {known} points, {len(points) - known} diverged."
    caption = (
        f"Every point's {data.score} against each searched key. The star is the best"
        f"{data.scale_name(data.proxy, ' at ')}; crosses at the edge are points that diverged."
    )
    return builder.figure("slices", alt, caption, variant)


def parallel_figure(data: ReportData, variant: str) -> Figure | None:
    """A line per point at the proxy over all searched keys and the score, coloured by rank.

    None if no point at the proxy has a score.
    """
    import matplotlib

    points = data.of(variant, data.proxy)
    ranked = data.ranked(points)
    if not ranked:
        return None
    axes = [axis_of(data, key, points) for key in data.keys]
    builder = FigureBuilder(data, ranked, 2.0 * len(axes) + 3.6, 3.8)
    panel = builder.canvas.subplots()
    panel.spines[:].set_visible(False)
    rulers = [_ruler(panel, x, axis) for x, axis in enumerate(axes)]
    rulers.append(_ruler(panel, len(axes)))
    rulers[-1].set_ylim(builder.limits)
    to_height = [(ruler.transScale + ruler.transLimits).transform for ruler in rulers]
    dashed: dict[str, Any] = {"color": DIVERGED, "linestyle": (0, (3, 3)), "linewidth": 0.9, "alpha": 0.6}
    lines = [(point, dashed) for point in points if point.mean(data.score) is None]
    for rank in reversed(range(len(ranked))):
        part = rank / max(len(ranked) - 1, 1)
        colour = matplotlib.colormaps["viridis"](0.05 + 0.9 * part)
        look = {"color": colour, "linewidth": 1.4, "alpha": 0.95 - 0.6 * part}
        lines.append((ranked[rank], look if rank else {"color": CHOSEN, "linewidth": 3.0, "zorder": 5}))
    for point, look in lines:
        mean = point.mean(data.score)
        score = builder.worst if mean is None else np.clip(mean, *builder.limits)
        positions = [*(axis.at(point.hps[axis.key]) for axis in axes), score]
        heights = [transform((0, at))[1] for transform, at in zip(to_height, positions, strict=True)]
        builder.plot(panel, range(len(rulers)), heights, data.tooltip(point), clip_on=False, **look)
    panel.set_xticks(range(len(rulers)), [*(axis.label for axis in axes), plain_label(data.score)], fontsize=9)
    panel.set(xlim=(0, len(axes)), ylim=(0, 1), yticks=[])
    alt = f"Parallel coordinates of {len(points)} points; the best is {hps_text(ranked[0].hps)}."
    caption = "A line per point: orange is the best, then from dark to light by rank; dashed red lines diverged."
    return builder.figure("parallel", alt, caption, variant)


def _ruler(panel: Any, x: float, axis: ValueAxis | None = None) -> Any:
    """A vertical axis at ``x`` of ``panel``, from the lowest to the highest value of ``axis``."""
    ruler = panel.twinx()
    if axis is not None:
        ruler.margins(y=0)
        ruler.plot([x] * len(axis.values), list(map(axis.at, axis.values)), " ")
        axis.draw(ruler.yaxis)
        ruler.autoscale_view()
    ruler.spines[:].set_visible(False)
    ruler.spines.right.set(visible=True, position=("data", x), color=INK)
    ruler.grid(False)
    ruler.tick_params(colors=INK, labelsize=7.5, pad=1)
    for label in ruler.get_yticklabels():
        label.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})
    return ruler
