"""Figures of a search over several hyperparameters: importance, slices, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megadit.files.text import plain_label
from megadit.search.report.axes import ValueAxis, score_limits, value_axis
from megadit.search.report.blocks import Figure
from megadit.search.report.canvas import CHOSEN, DIVERGED, Sheet, dress, scale_colours, scale_markers, value_ticks
from megadit.search.report.importance import Importance
from megadit.search.report.points import Gathered, Point, point_tip
from megadit.search.report.words import hps_text, number_text

_ACROSS = 4  # panels in a row


def importance_figure(found: Importance) -> Figure:
    """Bars of the shares; the control's share as a line: bars that do not pass it are noise."""
    sheet = Sheet(7.2, 0.9 + 0.38 * len(found.shares))
    axis: Any = sheet.canvas.subplots()
    names = [name for name, _ in found.shares][::-1]
    shares = [share for _, share in found.shares][::-1]
    colours = ["#2563a8" if share > found.control else "#b8c2d1" for share in shares]
    bars = axis.barh(names, shares, color=colours, height=0.62)
    axis.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], padding=4, fontsize=8)
    axis.axvline(found.control, color=DIVERGED, linestyle="--", linewidth=1.2)
    axis.annotate(
        "control", (found.control, 1.0), (3, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
        fontsize=8, color=DIVERGED,
    )  # fmt: skip
    dress(axis)
    axis.grid(False, axis="y")
    axis.set_xlim(0, max(*shares, found.control) * 1.15)
    axis.set_xlabel("share of what the forest explains of the score's rank", fontsize=9)
    told = ", ".join(f"{name} {100 * share:.0f} percent" for name, share in found.shares)
    caption = (
        f"Functional ANOVA of a random forest on the ranks of {found.points} points' scores"
        + (f"; the {found.diverged} that diverged share the worst rank" if found.diverged else "")
        + ". The dashed line is what a made-up hyperparameter of random values gets: shorter bars are noise."
    )
    alt = f"Importance: {told}; control {100 * found.control:.0f} percent."
    return Figure("importance", sheet.canvas, alt, caption, sheet.tips)


def _axes_of(gathered: Gathered, points: Sequence[Point]) -> list[ValueAxis]:
    """An axis for each searched key."""
    dimensions = gathered.results.study.space.dimensions
    return [value_axis(d.key, d.kind, [point.hps[d.key] for point in points]) for d in dimensions]


def slice_figure(gathered: Gathered, variant: str) -> Figure | None:
    """Score against each searched key in turn, every point in each panel; None when no point has a score."""
    points = [point for point in gathered.of(variant) if point.finished]
    means = [mean for point in points if (mean := point.mean(gathered.score)) is not None]
    if not means:
        return None
    axes = _axes_of(gathered, points)
    across = min(_ACROSS, len(axes))
    rows = math.ceil(len(axes) / across)
    sheet = Sheet(2.9 * across + (1.1 if gathered.scaled else 0), 2.9 * rows + 0.2)
    panels: Any = sheet.canvas.subplots(rows, across, squeeze=False, sharey=True)
    limits = score_limits(means, gathered.lower_is_better())
    colours, markers = scale_colours(gathered.scales), scale_markers(gathered.scales)
    best = gathered.ranked([point for point in points if point.scale == gathered.proxy])[:1]
    for index, values in enumerate(axes):
        panel = panels[index // across][index % across]
        for point in points:
            x, mean = values.at(point.hps[values.key]), point.mean(gathered.score)
            look: dict[str, Any] = {"color": colours[point.scale], "markersize": 5, "alpha": 0.75, "clip_on": False}
            if mean is None:
                edge = limits[1] if gathered.lower_is_better() else limits[0]
                look |= {"color": DIVERGED, "alpha": 1.0, "markeredgewidth": 1.6}
                sheet.mark(panel, x, edge, "x", point_tip(gathered, point), **look)
                continue
            if point in best:
                look |= {"color": CHOSEN, "markersize": 15, "alpha": 1.0, "zorder": 5, "markeredgecolor": "white"}
            shown = min(max(mean, limits[0]), limits[1])
            marker = "*" if point in best else markers[point.scale]
            sheet.mark(panel, x, shown, marker, point_tip(gathered, point), **look)
        dress(panel)
        value_ticks(panel, values)
        panel.set_ylim(*limits)
    for spare in range(len(axes), rows * across):
        panels[spare // across][spare % across].set_axis_off()
    for row in panels:
        row[0].set_ylabel(plain_label(gathered.score), fontsize=9)
    name = f"slices-{variant}" if variant else "slices"
    diverged = len(points) - len(means)
    alt = f"{gathered.score} against each of {', '.join(gathered.keys)}: {len(means)} points, {diverged} diverged."
    caption = f"Every point's {gathered.score} against each searched key. The star is the best"
    caption += f" at {gathered.scale_name(gathered.proxy)}" if gathered.scaled else ""
    caption += "; crosses at the edge are points that diverged."
    return Figure(name, sheet.canvas, alt, caption, sheet.tips)


def parallel_figure(gathered: Gathered, variant: str) -> Figure | None:
    """A line per point at the proxy over all searched keys and the score; coloured by rank. None without scores."""
    points = [point for point in gathered.of(variant, gathered.proxy) if point.finished]
    ranked = gathered.ranked(points)
    if not ranked:
        return None
    import matplotlib

    axes = _axes_of(gathered, points)
    means = [mean for point in ranked if (mean := point.mean(gathered.score)) is not None]
    low, high = score_limits(means, gathered.lower_is_better())
    sheet = Sheet(2.0 * (len(axes) + 1) + 1.6, 3.8)
    panel: Any = sheet.canvas.subplots()
    colours = matplotlib.colormaps["viridis"]
    order = {id(point): index / max(len(ranked) - 1, 1) for index, point in enumerate(ranked)}
    last = len(axes)
    for point in [*(p for p in points if id(p) not in order), *reversed(ranked)]:
        mean = point.mean(gathered.score)
        end = _height(mean, low, high) if mean is not None else float(gathered.lower_is_better())
        heights = [*(_part(axis, point.hps[axis.key]) for axis in axes), end]
        rank = order.get(id(point))
        if rank is None:
            look: dict[str, Any] = {"color": DIVERGED, "linestyle": (0, (3, 3)), "linewidth": 0.9, "alpha": 0.6}
        elif point is ranked[0]:
            look = {"color": CHOSEN, "linewidth": 3.0, "zorder": 5}
        else:
            look = {"color": colours(0.05 + 0.9 * rank), "linewidth": 1.4, "alpha": 0.95 - 0.6 * rank}
        sheet.line(panel, range(last + 1), heights, point_tip(gathered, point), **look)
    for index, axis in enumerate(axes):
        ticks, labels = axis.ticks()
        _ruler(panel, index, [_fraction(axis, tick) for tick in ticks], labels)
    marks = [low + (high - low) * part for part in (0.08, 0.36, 0.64, 0.92)]
    _ruler(panel, last, [_height(mark, low, high) for mark in marks], [number_text(mark, 3) for mark in marks])
    panel.set_xticks(range(last + 1), [*(axis.label for axis in axes), gathered.score], fontsize=9)
    panel.set_xlim(-0.25, last + 0.35)
    panel.set_ylim(-0.06, 1.06)
    panel.set_yticks([])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    name = f"parallel-{variant}" if variant else "parallel"
    alt = f"Parallel coordinates of {len(points)} points; the best is {hps_text(ranked[0].hps)}."
    caption = "A line per point: orange is the best, then from dark to light by rank; dashed red lines diverged."
    return Figure(name, sheet.canvas, alt, caption, sheet.tips)


def _height(score: float, low: float, high: float) -> float:
    return min(max((score - low) / (high - low), 0.0), 1.0)


def _fraction(axis: ValueAxis, position: float) -> float:
    """A position of the axis as a part of its length."""
    first, last = (axis.low, axis.high) if axis.kind == "listed" else (axis.at(axis.low), axis.at(axis.high))
    return 0.5 if last == first else (position - first) / (last - first)


def _part(axis: ValueAxis, value: Any) -> float:
    return _fraction(axis, axis.at(value))


def _ruler(panel: Any, x: float, heights: Sequence[float], labels: Sequence[str]) -> None:
    """A vertical axis at ``x`` with its own labels."""
    panel.plot([x, x], [0, 1], color="#1c2430", linewidth=1, zorder=6)
    for height, label in zip(heights, labels, strict=True):
        panel.plot([x - 0.015, x + 0.015], [height, height], color="#1c2430", linewidth=1, zorder=6)
        panel.annotate(
            label, (x, height), (5, 0), textcoords="offset points", fontsize=7.5, va="center", zorder=7,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
