"""The figure of a transfer study: score against a hyperparameter, a panel per variant, a curve per scale value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadit.files.text import plain_label
from megadit.search.report.axes import ValueAxis, score_limits, value_axis
from megadit.search.report.blocks import Figure
from megadit.search.report.canvas import DIVERGED, Sheet, dress, scale_colours, scale_markers, value_ticks
from megadit.search.report.points import Gathered, Point, point_tip
from megadit.search.report.words import counted, number_text
from megadit.search.wording import value_text
from megadit.transfer.verdict import Verdict


@dataclass(frozen=True)
class _Panels:
    """What the panels share: axis of values, range of scores, looks of the scales."""

    gathered: Gathered
    values: ValueAxis
    limits: tuple[float, float]
    colours: Mapping[float, Any]
    markers: Mapping[float, str]


def curve_figure(gathered: Gathered, key: str, verdicts: Mapping[str, Verdict]) -> Figure | None:
    """Score against ``key``, best over the other searched keys; None when no point has a score.

    Below the curves, where a verdict located the optimum of each scale, the optimum against scale: its slope is the
    drift.
    """
    curves = {
        (variant, scale): _profile(gathered, gathered.of(variant, scale), key)
        for variant in gathered.variants
        for scale in gathered.scales
    }
    means = [mean for points in curves.values() for p in points if (mean := p.mean(gathered.score)) is not None]
    if not means:
        return None
    points = [point for points in curves.values() for point in points]
    panels = _Panels(
        gathered,
        value_axis(key, gathered.results.study.space.dimension(key).kind, [point.hps[key] for point in points]),
        score_limits(means, gathered.lower_is_better()),
        scale_colours(gathered.scales),
        scale_markers(gathered.scales),
    )
    located = {name: verdict for name, verdict in verdicts.items() if any(s.optimum for s in verdict.scales)}
    below = gathered.scaled and bool(located) and panels.values.kind == "log"
    variants = gathered.variants
    sheet = Sheet(4.2 + 4.6 * (len(variants) - 1) + (1.2 if gathered.scaled else 0), 5.4 if below else 3.9)
    grid: Any = sheet.canvas.subplots(
        2 if below else 1, len(variants), squeeze=False, height_ratios=[3, 1.1] if below else [1], sharey="row"
    )
    for column, variant in enumerate(variants):
        upper = grid[0][column]
        for scale in gathered.scales:
            _draw_curve(sheet, upper, panels, curves[variant, scale], scale)
        dress(upper, variant)
        value_ticks(upper, panels.values, labelled=not below)
        upper.set_ylim(*panels.limits)
        if below:
            _draw_optima(sheet, grid[1][column], panels, located.get(variant))
    grid[0][0].set_ylabel(plain_label(gathered.score), fontsize=9)
    if below:
        grid[1][0].set_ylabel(gathered.scale_name(0).split()[0], fontsize=9)
    _legend(sheet, panels)
    return Figure(f"curves-{key}", sheet.canvas, _alt(panels, curves), _caption(gathered, key, below), sheet.tips)


def _profile(gathered: Gathered, points: Sequence[Point], key: str) -> list[Point]:
    """Per value of ``key`` the best point over the other keys; one that diverged only where all did."""
    by_value: dict[str, list[Point]] = {}
    for point in points:
        if point.finished:
            by_value.setdefault(repr(point.hps[key]), []).append(point)
    return [(gathered.ranked(group) or group)[0] for group in by_value.values()]


def _draw_curve(sheet: Sheet, axis: Any, panels: _Panels, points: Sequence[Point], scale: float) -> None:
    score, look = panels.gathered.score, {"color": panels.colours[scale]}
    at = {id(point): panels.values.at(point.hps[panels.values.key]) for point in points}
    known = sorted((p for p in points if p.mean(score) is not None), key=lambda p: at[id(p)])
    if panels.values.kind != "listed":
        axis.plot([at[id(p)] for p in known], [p.mean(score) for p in known], "-", linewidth=1.6, **look)
    best = panels.gathered.ranked(known)[:1]
    for point in points:
        x, mean = at[id(point)], point.mean(score)
        tip = point_tip(panels.gathered, point)
        if mean is None:
            _diverged(sheet, axis, panels, x, scale, tip)
            continue
        for value in point.scores(score):
            axis.plot([x], [value], ".", markersize=4, alpha=0.45, **look)
        marker = "*" if point in best else panels.markers[scale]
        shown = _clipped(mean, panels.limits)
        size = 13 if point in best else 6
        edge = "white" if shown == mean else DIVERGED
        sheet.mark(axis, x, shown, marker, tip, markersize=size, markeredgecolor=edge, zorder=4, clip_on=False, **look)


def _diverged(sheet: Sheet, axis: Any, panels: _Panels, x: float, scale: float, tip: str) -> None:
    """A cross at the bad end of the panel, one row per scale, in the colour of the scale."""
    low, high = panels.limits
    row = panels.gathered.scales.index(scale)
    step = 0.045 * (high - low)
    y = high - step * (row + 0.5) if panels.gathered.lower_is_better() else low + step * (row + 0.5)
    colour = panels.colours[scale]
    sheet.mark(axis, x, y, "x", tip, color=colour, markersize=7, markeredgewidth=2.2, zorder=5, clip_on=False)


def _clipped(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _draw_optima(sheet: Sheet, axis: Any, panels: _Panels, verdict: Verdict | None) -> None:
    """Scale upwards, optimum with its interval across: a vertical line is transfer."""
    scales = panels.gathered.scales
    for entry in verdict.scales if verdict else ():
        optimum = entry.optimum
        if optimum is None or entry.scale not in panels.colours:
            continue
        y, look = math.log2(entry.scale), {"color": panels.colours[entry.scale]}
        tip = f"{panels.gathered.scale_name(entry.scale)}: optimum {2.0**optimum.at:.3g} (log2 {optimum.at:.2f}), "
        tip += f"95 % interval of log2 {optimum.interval[0]:.2f} to {optimum.interval[1]:.2f}\n{entry.why}"
        sheet.line(axis, optimum.interval, [y, y], tip, linewidth=3, solid_capstyle="round", alpha=0.55, **look)
        sheet.mark(
            axis,
            optimum.at,
            y,
            panels.markers[entry.scale],
            tip,
            markersize=7,
            markeredgecolor="white",
            zorder=4,
            **look,
        )
    found = [(e.optimum.at, math.log2(e.scale)) for e in (verdict.scales if verdict else ()) if e.optimum]
    if len(found) > 1:
        axis.plot(*zip(*found, strict=True), ":", color="#566173", linewidth=1, zorder=1)
    dress(axis)
    value_ticks(axis, panels.values)
    axis.set_yticks([math.log2(scale) for scale in scales], [f"{scale:g}" for scale in scales])
    margin = 0.25 * (math.log2(scales[-1] / scales[0]) or 1.0)
    axis.set_ylim(math.log2(scales[0]) - margin, math.log2(scales[-1]) + margin)


def _legend(sheet: Sheet, panels: _Panels) -> None:
    from matplotlib.lines import Line2D

    lines = []
    if panels.gathered.scaled:
        lines += [
            Line2D([], [], color=panels.colours[s], marker=panels.markers[s], label=panels.gathered.scale_name(s))
            for s in panels.gathered.scales
        ]
    grey: dict[str, Any] = {"color": "#566173", "linestyle": "none"}
    lines.append(Line2D([], [], marker="*", markersize=11, label="best", **grey))
    lines.append(Line2D([], [], marker=".", alpha=0.6, label="one seed", **grey))
    lines.append(Line2D([], [], marker="x", markeredgewidth=2, label="diverged", **grey))
    sheet.canvas.legend(handles=lines, loc="outside right center", fontsize=8, frameon=False)


def _caption(gathered: Gathered, key: str, below: bool) -> str:
    text = (
        f"Mean {gathered.score} over seeds against {key}; dots are single seeds, stars the best value of each curve, "
    )
    text += "crosses values at which a run diverged. Scores far from the best are drawn at the edge."
    if len(gathered.keys) > 1:
        text += " At each value the best over the other searched keys."
    if below:
        text += " Below: the fitted optimum of each curve with its 95 % interval; its slope is the drift."
    return text


def _alt(panels: _Panels, curves: Mapping[tuple[str, float], Sequence[Point]]) -> str:
    gathered, key = panels.gathered, panels.values.key
    told = []
    for (variant, scale), points in curves.items():
        best = gathered.ranked(points)[:1]
        name = (
            " ".join(part for part in (variant, panels.gathered.scale_name(scale) if gathered.scaled else "") if part)
            or "all runs"
        )
        diverged = sum(point.mean(gathered.score) is None for point in points)
        if best:
            text = f"{name} best at {value_text(best[0].hps[key])} with {number_text(best[0].mean(gathered.score))}"
        elif points:
            text = f"{name} without a best point"
        else:
            continue
        told.append(text + (f", {counted(diverged, 'value')} diverged" if diverged else ""))
    return f"{gathered.score} against {key}. " + "; ".join(told) + "."
