"""Figures of a search over several hyperparameters: importance, slices, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megadit.files.text import plain_label
from megadit.search.report.figure import CHOSEN, DIVERGED, INK, Figure, Sheet, axis_of, dress, new_canvas
from megadit.search.report.importance import measure_importance
from megadit.search.report.points import Gathered, point_tip
from megadit.search.wording import hps_text, number_text, value_text

_ACROSS = 4  # panels in a row


def importance_figure(gathered: Gathered) -> Figure | str:
    """Which keys decide at the proxy: bars of the shares, and the control's as a line; bars below it are noise.

    A sentence where there are too few points to tell.
    """
    points = [p for p in gathered.of(gathered.results.study.variants[0], gathered.proxy) if p.finished]
    scored = [(p.hps, math.nan if (mean := p.mean(gathered.score)) is None else mean) for p in points]
    found = measure_importance(scored, gathered.lower_is_better())
    if isinstance(found, str):
        return found
    canvas = new_canvas(7.2, 0.9 + 0.38 * len(found.shares))
    panel = canvas.subplots()
    names, shares = zip(*reversed(found.shares), strict=True)
    colours = ["#2563a8" if share > found.control else "#b8c2d1" for share in shares]
    bars = panel.barh(names, shares, color=colours, height=0.62)
    panel.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], padding=4, fontsize=8)
    panel.axvline(found.control, color=DIVERGED, linestyle="--", linewidth=1.2)
    panel.annotate(
        "control", (found.control, 1.0), (3, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
        fontsize=8, color=DIVERGED,
    )  # fmt: skip
    dress(panel)
    panel.grid(False, axis="y")
    panel.set_xlim(0, max(*shares, found.control) * 1.15)
    panel.set_xlabel("share of what the forest explains of the score's rank", fontsize=9)
    told = ", ".join(f"{name} {100 * share:.0f} percent" for name, share in found.shares)
    caption = (
        f"Functional ANOVA of a random forest on the ranks of {found.points} points' scores"
        + (f"; the {found.diverged} that diverged share the worst rank" if found.diverged else "")
        + ". The dashed line is what a made-up hyperparameter of random values gets: shorter bars are noise."
    )
    return Figure("importance", canvas, f"Importance: {told}; control {100 * found.control:.0f} percent.", caption)


def slice_figure(gathered: Gathered, variant: str) -> Figure | None:
    """Score against each searched key in turn, every point in each panel; None when no point has a score."""
    points = [point for point in gathered.of(variant) if point.finished]
    known = len(gathered.means(points))
    if not known:
        return None
    across = min(_ACROSS, len(gathered.keys))
    rows = math.ceil(len(gathered.keys) / across)
    sheet = Sheet(gathered, points, 2.9 * across + (1.1 if gathered.scaled else 0), 2.9 * rows + 0.2)
    panels = sheet.canvas.subplots(rows, across, squeeze=False, sharey=True)
    best = gathered.ranked([point for point in points if point.scale == gathered.proxy])[:1]
    star = {"marker": "*", "color": CHOSEN, "markersize": 15, "zorder": 5}
    for key, panel in zip(gathered.keys, panels.flat, strict=False):
        values = axis_of(gathered, key, points)
        for point in points:
            look = {"alpha": 0.75} if point.mean(gathered.score) is not None else {"color": DIVERGED}
            sheet.mark(panel, values.at(point.hps[key]), point, **(star if point in best else look))
        dress(panel)
        values.draw(panel)
    for spare in panels.flat[len(gathered.keys) :]:
        spare.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylim(*sheet.limits)
        panel.set_ylabel(plain_label(gathered.score), fontsize=9)
    alt = f"{gathered.score} against each of {', '.join(gathered.keys)}: "
    alt += f"{known} points, {len(points) - known} diverged."
    caption = f"Variant {variant}. " if variant else ""
    caption += f"Every point's {gathered.score} against each searched key. The star is the best"
    caption += f" at {gathered.scale_name(gathered.proxy)}" if gathered.scaled else ""
    return sheet.figure(_name("slices", variant), alt, caption + "; crosses at the edge are points that diverged.")


def parallel_figure(gathered: Gathered, variant: str) -> Figure | None:
    """A line per point at the proxy over all searched keys and the score; coloured by rank. None without scores."""
    import matplotlib

    points = [point for point in gathered.of(variant, gathered.proxy) if point.finished]
    ranked = gathered.ranked(points)
    if not ranked:
        return None
    axes = [axis_of(gathered, key, points) for key in gathered.keys]
    last = len(axes)
    sheet = Sheet(gathered, ranked, 2.0 * (last + 1) + 1.6, 3.8)
    low, high = sheet.limits
    panel = sheet.canvas.subplots()

    def height(score: float | None) -> float:
        worst = high if gathered.lower_is_better() else low
        return min(max(((worst if score is None else score) - low) / (high - low), 0.0), 1.0)

    lines: list[tuple[Any, dict[str, Any]]] = []
    dashed = {"color": DIVERGED, "linestyle": (0, (3, 3)), "linewidth": 0.9, "alpha": 0.6}
    lines += [(point, dashed) for point in points if point.mean(gathered.score) is None]
    for place in reversed(range(len(ranked))):
        part = place / max(len(ranked) - 1, 1)
        look = {
            "color": matplotlib.colormaps["viridis"](0.05 + 0.9 * part),
            "linewidth": 1.4,
            "alpha": 0.95 - 0.6 * part,
        }
        lines.append((ranked[place], look if place else {"color": CHOSEN, "linewidth": 3.0, "zorder": 5}))
    for point, look in lines:
        heights = [*(axis.part(point.hps[axis.key]) for axis in axes), height(point.mean(gathered.score))]
        sheet.plot(panel, range(last + 1), heights, point_tip(gathered, point), **look)
    for index, axis in enumerate(axes):
        _ruler(panel, index, list(map(axis.part, axis.ticks())), list(map(value_text, axis.ticks())))
    marks = [low + (high - low) * part for part in (0.08, 0.36, 0.64, 0.92)]
    _ruler(panel, last, list(map(height, marks)), [number_text(mark, 3) for mark in marks])
    panel.set_xticks(range(last + 1), [*(axis.label for axis in axes), gathered.score], fontsize=9)
    panel.set_xlim(-0.25, last + 0.35)
    panel.set_ylim(-0.06, 1.06)
    panel.set_yticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    alt = f"Parallel coordinates of {len(points)} points; the best is {hps_text(ranked[0].hps)}."
    caption = f"Variant {variant}. " if variant else ""
    caption += "A line per point: orange is the best, then from dark to light by rank; dashed red lines diverged."
    return sheet.figure(_name("parallel", variant), alt, caption)


def _name(kind: str, variant: str) -> str:
    return f"{kind}-{variant}" if variant else kind


def _ruler(panel: Any, x: float, heights: Sequence[float], labels: Sequence[str]) -> None:
    """A vertical axis at ``x`` with its own labels."""
    panel.plot([x, x], [0, 1], color=INK, linewidth=1, zorder=6)
    panel.plot([x] * len(heights), heights, "_", color=INK, markersize=7, zorder=6)
    for height, label in zip(heights, labels, strict=True):
        panel.annotate(
            label, (x, height), (5, 0), textcoords="offset points", fontsize=7.5, va="center", zorder=7,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
