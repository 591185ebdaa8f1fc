"""The figure of a transfer study: score against a hyperparameter, a panel per variant, a curve per scale value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megadit.files.text import plain_label
from megadit.search.report.figure import SOFT, Figure, Sheet, ValueAxis, axis_of, dress
from megadit.search.report.points import Gathered, Point
from megadit.search.wording import counted, number_text, value_text
from megadit.transfer.verdict import TransferVerdict


def curve_figure(gathered: Gathered, key: str, verdicts: Mapping[str, TransferVerdict]) -> Figure | None:
    """Score against ``key``, best over the other searched keys; None when no point has a score.

    Below the curves, where a verdict located the optimum of each scale, the optimum against scale: its slope is the
    drift.
    """
    variants = gathered.variants
    curves = {(v, s): _profile(gathered, gathered.of(v, s), key) for v in variants for s in gathered.scales}
    points = [point for curve in curves.values() for point in curve]
    if not gathered.means(points):
        return None
    values = axis_of(gathered, key, points)
    located = {name: verdict for name, verdict in verdicts.items() if any(s.optimum for s in verdict.scales)}
    below = gathered.scaled and bool(located) and values.kind == "log"
    width = 4.2 + 4.6 * (len(variants) - 1) + (1.2 if gathered.scaled else 0)
    sheet = Sheet(gathered, points, width, 5.4 if below else 3.9)
    grid = sheet.canvas.subplots(
        2 if below else 1, len(variants), squeeze=False, height_ratios=[3, 1.1] if below else [1], sharey="row"
    )
    for column, variant in enumerate(variants):
        for scale in gathered.scales:
            _draw_curve(sheet, grid[0][column], values, curves[variant, scale])
        dress(grid[0][column], variant)
        values.draw(grid[0][column], labelled=not below)
        if below:
            _draw_optima(sheet, grid[1][column], values, located.get(variant))
    grid[0][0].set_ylim(*sheet.limits)
    grid[0][0].set_ylabel(plain_label(gathered.score), fontsize=9)
    if below:
        grid[1][0].set_ylabel(gathered.scale_word, fontsize=9)
    _legend(sheet)
    return sheet.figure(f"curves-{key}", _alt(gathered, key, curves), _caption(gathered, key, below))


def _profile(gathered: Gathered, points: Sequence[Point], key: str) -> list[Point]:
    """Per value of ``key`` the best point over the other keys; one that diverged only where all did."""
    by_value: dict[str, list[Point]] = {}
    for point in points:
        if point.finished:
            by_value.setdefault(repr(point.hps[key]), []).append(point)
    return [(gathered.ranked(group) or group)[0] for group in by_value.values()]


def _draw_curve(sheet: Sheet, panel: Any, values: ValueAxis, curve: Sequence[Point]) -> None:
    """The points of one scale, the best as a star; a line through those with a score; their seeds as dots."""
    score = sheet.gathered.score
    points = sorted(((values.at(p.hps[values.key]), p) for p in curve), key=lambda placed: placed[0])
    known = [(x, mean) for x, p in points if (mean := p.mean(score)) is not None]
    if known:
        look = {"color": sheet.colours[curve[0].scale]}
        if values.kind != "listed":
            panel.plot(*zip(*known, strict=True), "-", linewidth=1.6, **look)
        seeds = [(x, value) for x, p in points if p.mean(score) is not None for value in p.scores(score)]
        panel.plot(*zip(*seeds, strict=True), ".", markersize=4, alpha=0.45, **look)
    best = sheet.gathered.ranked(curve)[:1]
    for x, point in points:
        sheet.mark(panel, x, point, **({"marker": "*", "markersize": 13} if point in best else {}))


def _draw_optima(sheet: Sheet, panel: Any, values: ValueAxis, verdict: TransferVerdict | None) -> None:
    """Scale upwards, optimum with its interval across: a vertical line is transfer."""
    scales = sheet.gathered.scales
    found = [(entry, entry.optimum) for entry in (verdict.scales if verdict else ()) if entry.optimum]
    for entry, optimum in found:
        look = {"color": sheet.colours[entry.scale]}
        tip = f"{sheet.gathered.scale_name(entry.scale)}: optimum {2.0**optimum.at:.3g} (log2 {optimum.at:.2f}), "
        tip += f"95 % interval of log2 {optimum.interval[0]:.2f} to {optimum.interval[1]:.2f}\n{entry.why}"
        wide = {"linewidth": 3, "solid_capstyle": "round", "alpha": 0.55}
        sheet.plot(panel, optimum.interval, [entry.scale] * 2, tip, **look | wide)
        mark = {"marker": sheet.markers[entry.scale], "markersize": 7, "markeredgecolor": "white", "zorder": 4}
        sheet.plot(panel, [optimum.at], [entry.scale], tip, **look | mark)
    if len(found) > 1:
        panel.plot([o.at for _, o in found], [e.scale for e, _ in found], ":", color=SOFT, linewidth=1, zorder=1)
    values.draw(panel)
    panel.set_yscale("log", base=2)
    panel.set_yticks(scales, [f"{scale:g}" for scale in scales])
    margin = max(scales[-1] / scales[0], 2.0) ** 0.25
    panel.set_ylim(scales[0] / margin, scales[-1] * margin)
    dress(panel)


def _legend(sheet: Sheet) -> None:
    from matplotlib.lines import Line2D

    gathered = sheet.gathered
    lines = [
        Line2D([], [], color=sheet.colours[s], marker=sheet.markers[s], label=gathered.scale_name(s))
        for s in (gathered.scales if gathered.scaled else ())
    ]
    grey: dict[str, Any] = {"color": SOFT, "linestyle": "none"}
    lines.append(Line2D([], [], marker="*", markersize=11, label="best", **grey))
    lines.append(Line2D([], [], marker=".", alpha=0.6, label="one seed", **grey))
    lines.append(Line2D([], [], marker="x", markeredgewidth=2, label="diverged", **grey))
    sheet.canvas.legend(handles=lines, loc="outside right center", fontsize=8, frameon=False)


def _caption(gathered: Gathered, key: str, below: bool) -> str:
    text = (
        f"Mean {gathered.score} over seeds against {key}; dots are single seeds, stars the best value of each curve, "
        "crosses values at which a run diverged. Scores far from the best are drawn at the edge."
    )
    if len(gathered.keys) > 1:
        text += " At each value the best over the other searched keys."
    if below:
        text += " Below: the fitted optimum of each curve with its 95 % interval; its slope is the drift."
    return text


def _alt(gathered: Gathered, key: str, curves: Mapping[tuple[str, float], Sequence[Point]]) -> str:
    told = []
    for (variant, scale), points in curves.items():
        if not points:
            continue
        text = " ".join(filter(None, (variant, gathered.scale_name(scale) if gathered.scaled else ""))) or "all runs"
        diverged = len(points) - len(gathered.means(points))
        if best := gathered.ranked(points)[:1]:
            text += f" best at {value_text(best[0].hps[key])} with {number_text(best[0].mean(gathered.score))}"
        else:
            text += " without a best point"
        told.append(text + (f", {counted(diverged, 'value')} diverged" if diverged else ""))
    return f"{gathered.score} against {key}. " + "; ".join(told) + "."
