"""A comparison as a picture: both curves above, their gap with its crossings below."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from megadit.compare.runs import Comparison, Gap, MeanCurve
from megadit.files.text import plain_label

_A, _B, _GAP = "tab:blue", "tab:orange", "black"


def plot_comparison(result: Comparison, path: str | os.PathLike[str]) -> None:
    """Write a PNG with two panels over steps, and two more over samples where the batches differ.

    Bands are one standard deviation over seeds (curves) and one standard error (gap).
    """
    from matplotlib.figure import Figure

    gaps = result.shown
    figure = Figure(figsize=(6.4 * len(gaps), 6.0), layout="constrained")
    axes: Any = figure.subplots(2, len(gaps), squeeze=False, sharex="col")
    for column, gap in enumerate(gaps):
        upper, lower = axes[0][column], axes[1][column]
        _curve(upper, gap.a, _A, plain_label("A: " + _label([curve.name for curve in result.a])))
        _curve(upper, gap.b, _B, plain_label("B: " + _label([curve.name for curve in result.b])))
        _limit(upper, gap.a.mean, gap.b.mean)
        upper.set_ylabel(plain_label(result.key))
        upper.legend(fontsize=8, frameon=False)
        _gap_panel(lower, gap, result.key)
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110, format="png")


def _curve(axis: Any, side: MeanCurve, colour: str, label: str) -> None:
    marker = "o" if len(side.at) < 30 else None
    axis.plot(side.at, side.mean, color=colour, label=label, linewidth=1.3, marker=marker, markersize=3)
    if np.isfinite(side.sd).any():
        axis.fill_between(side.at, side.mean - side.sd, side.mean + side.sd, color=colour, alpha=0.2, linewidth=0)


def _gap_panel(axis: Any, gap: Gap, key: str) -> None:
    axis.axhline(0.0, color="grey", linewidth=0.8)
    axis.plot(gap.at, gap.gap, color=_GAP, linewidth=1.3, marker="o" if len(gap.at) < 30 else None, markersize=3)
    if np.isfinite(gap.se).any():
        axis.fill_between(gap.at, gap.gap - gap.se, gap.gap + gap.se, color=_GAP, alpha=0.15, linewidth=0)
    _limit(axis, gap.gap, np.zeros(1))
    for crossing in gap.crossings:
        axis.plot([crossing.at], [0.0], "v", color="crimson", markersize=6, clip_on=False)
    if gap.crossings:
        last = gap.crossings[-1]
        left = last.at < 0.5 * float(gap.at[-1])
        axis.annotate(
            plain_label(f"{gap.axis.removesuffix('s')} {last.at:,.0f}, {key} {last.value:.4g}"),
            (last.at, 0.0),
            xytext=(6 if left else -6, 8),
            textcoords="offset points",
            fontsize=8,
            color="crimson",
            ha="left" if left else "right",
        )
    axis.set_ylabel(plain_label(f"gap B − A of {key}"))
    axis.set_xlabel("step" if gap.axis == "steps" else "samples seen")


def _limit(axis: Any, *series: np.ndarray) -> None:
    """Keep the steep first twentieth of training from flattening all that follows."""
    values = np.concatenate([values[len(values) // 20 :] for values in series])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.08 * float(np.ptp(values)) or 1e-9
        axis.set_ylim(float(values.min()) - margin, float(values.max()) + margin)


def _label(names: list[str]) -> str:
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return shown + (f" ({len(names)} seeds)" if len(names) > 1 else "")
