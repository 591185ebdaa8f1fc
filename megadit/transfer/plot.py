"""A verdict as a picture: the curves of every scale with their parabolas, and the optimum against scale."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from megadit.files.text import plain_label
from megadit.transfer.estimate import Optimum, Parabola
from megadit.transfer.evidence import ScaleVerdict, power
from megadit.transfer.verdict import TransferVerdict

_Located = tuple[ScaleVerdict, Optimum, Any]  # with its colour


def plot_verdict(verdict: TransferVerdict, path: str | os.PathLike[str]) -> None:
    """Write a PNG: score against the hyperparameter, a curve per scale; beside it log2 optimum against scale.

    Dots are single runs, lines their means, dashes the parabola near the optimum, diamonds the optimum with its
    interval, crosses at the top edge values at which a run diverged. The dotted line is the proxy's best.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    located, labels = _located(verdict), verdict.evidence.labels
    _draw_curves(left, verdict, located)
    _draw_optima(right, verdict, located)
    name = " ".join(part for part in (labels.get("study") or labels.get("table"), labels.get("variant")) if part)
    figure.suptitle(plain_label(f"{name}: {verdict.verdict}".removeprefix(": ")), fontsize=11)
    figure.savefig(path, dpi=120, format="png")


def _draw_curves(axis: Any, verdict: TransferVerdict, located: Sequence[_Located]) -> None:
    """Score against log2 of the hyperparameter on matplotlib's ``axis``, a colour per scale."""
    sign, labels = verdict.evidence.sign, verdict.evidence.labels
    means = [point.mean for _, optimum, _ in located for point in optimum.curve.stable]
    for entry, optimum, colour in located:
        curve = optimum.curve
        label = f"{entry.scale:.12g}" + (" (exception)" if entry.exception else "")
        axis.plot(*zip(*((p.hp, sign * p.mean) for p in curve.stable), strict=True), color=colour, lw=1.4, label=label)
        dots = [(point.hp, sign * score) for point in curve.points for score in point.scores.values()]
        axis.plot(*zip(*dots, strict=True), "o", color=colour, ms=3.5, alpha=0.6)
        diverged = [point.hp for point in curve.points if not point.stable]
        axis.plot(diverged, [0.97] * len(diverged), "x", color=colour, ms=7, transform=axis.get_xaxis_transform())
        if optimum.parabola is not None:
            _draw_parabola(axis, optimum, optimum.parabola, sign, colour)
        if entry.is_proxy:
            axis.axvline(curve.best.hp, color="0.5", lw=0.9, ls=":", zorder=0)
    # Far walls would flatten what is near the optima: show three times the range of the lower half of all points.
    low, middle, high = min(means), float(np.median(means)), max(means)
    top = min(high, low + 3 * (middle - low)) if middle > low else high
    pad = 0.06 * (top - low) or 1e-9
    axis.set_ylim(*sorted((sign * (low - pad), sign * (top + 2 * pad))))
    ticks = sorted({point.hp for _, optimum, _ in located for point in optimum.curve.points})
    if len(ticks) <= 12:
        axis.set_xticks(ticks, [power(tick) for tick in ticks])
    axis.set_xlabel(plain_label(labels.get("hp", "hyperparameter").removeprefix("log2_")))
    axis.set_ylabel(plain_label(labels.get("score", "score")))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, title=plain_label(labels.get("scale", "")), title_fontsize=8)


def _draw_optima(axis: Any, verdict: TransferVerdict, located: Sequence[_Located]) -> None:
    """log2 optimum against scale with intervals; the line is the drift, arrows mark optima that are only bounds."""
    for entry, optimum, colour in located:
        x = math.log2(entry.scale)
        low, high = optimum.interval
        filled = colour if not entry.exception else "none"
        errors = [[optimum.at - low], [high - optimum.at]]
        axis.errorbar(x, optimum.at, errors, fmt="D", color=colour, mfc=filled, ms=6, capsize=4, lw=1.4)
        for side, marker in ((optimum.curve.low, "v"), (optimum.curve.high, "^")):
            if side == "open":
                axis.plot(x, low if marker == "v" else high, marker, color=colour, ms=9)
    if verdict.drift is not None:
        xs, ys = np.array([(math.log2(entry.scale), o.at) for entry, o, _ in located if not entry.exception]).T
        middle = float(ys.mean()) - verdict.drift * float(xs.mean())
        axis.plot(xs, middle + verdict.drift * xs, color="0.3", lw=1.0, ls="--")
        low, high = verdict.drift_interval or (math.nan, math.nan)
        axis.set_title(f"drift {verdict.drift:+.2f} ({low:+.2f} to {high:+.2f}) octaves per octave", fontsize=9)
    axis.set_xticks([math.log2(entry.scale) for entry, *_ in located], [f"{entry.scale:.12g}" for entry, *_ in located])
    bottom, top = axis.get_ylim()
    axis.set_ylim(min(bottom, (bottom + top) / 2 - 2), max(top, (bottom + top) / 2 + 2))  # flat should look flat
    axis.set_xlabel(plain_label(verdict.evidence.labels.get("scale", "scale")))
    axis.set_ylabel(plain_label(f"log2 of the best {verdict.evidence.labels.get('hp', 'value').removeprefix('log2_')}"))
    axis.grid(alpha=0.25)


def _draw_parabola(axis: Any, optimum: Optimum, parabola: Parabola, sign: float, colour: Any) -> None:
    """The fit over one step around its optimum, and the optimum with its interval on it."""
    curve = optimum.curve
    reach = 1.25 * max(curve.steps)
    xs = np.linspace(optimum.at - reach, optimum.at + reach, 61)
    xs = xs[(xs >= curve.stable[0].hp) & (xs <= curve.stable[-1].hp)]
    axis.plot(xs, [sign * parabola(float(x)) for x in xs], color=colour, lw=1.0, ls="--", alpha=0.8)
    low, high = optimum.interval
    y = sign * parabola(optimum.at)
    axis.errorbar(optimum.at, y, xerr=[[optimum.at - low], [high - optimum.at]], fmt="D", color=colour, ms=5, capsize=3)


def _located(verdict: TransferVerdict) -> list[_Located]:
    """The scales that have an optimum, each with it and its colour, dark to light with scale."""
    from matplotlib import colormaps

    located = [(entry, entry.optimum) for entry in verdict.scales if entry.optimum is not None]
    shades = np.linspace(0.05, 0.85, max(len(located), 2))
    return [(*pair, colormaps["viridis"](shade)) for pair, shade in zip(located, shades, strict=False)]
