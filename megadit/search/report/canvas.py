"""What all figures of a report share: a quiet look, colours of the scales, marks that tell their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megadit.files.text import plain_label
from megadit.search.report.axes import ValueAxis

MARKERS = "os^DvPX*"
DIVERGED = "#b3261e"
CHOSEN = "#d97706"
_INK, _SOFT, _GRID = "#1c2430", "#566173", "#dde2ea"


class Sheet:
    """A figure under construction: its panels, and the tips of the marks drawn so far."""

    def __init__(self, width: float, height: float) -> None:
        import matplotlib

        matplotlib.use("Agg", force=False)
        from matplotlib.figure import Figure

        self.canvas: Any = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        self.tips: dict[str, str] = {}

    def mark(self, axis: Any, x: float, y: float, style: str, tip: str, **look: Any) -> None:
        """One point; ``tip`` is shown when it is pointed at."""
        name = f"mark{len(self.tips)}"
        self.tips[name] = tip
        axis.plot([x], [y], style, gid=name, **look)

    def line(self, axis: Any, xs: Sequence[float], ys: Sequence[float], tip: str, **look: Any) -> None:
        """One polyline with a tip."""
        name = f"mark{len(self.tips)}"
        self.tips[name] = tip
        axis.plot(xs, ys, gid=name, **look)


def dress(axis: Any, title: str = "") -> None:
    """The common look of a panel."""
    axis.grid(color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_SOFT)
    axis.tick_params(colors=_SOFT, labelsize=8)
    if title:
        axis.set_title(plain_label(title), fontsize=10, color=_INK, loc="left", fontweight="bold")


def value_ticks(axis: Any, values: ValueAxis, labelled: bool = True) -> None:
    """Ticks, label and range of a horizontal axis that shows ``values``."""
    ticks, labels = values.ticks()
    turned = sum(map(len, labels)) > 42
    axis.set_xticks(
        ticks, list(map(plain_label, labels)), rotation=40 if turned else 0, ha="right" if turned else "center"
    )
    ends = (values.at(values.low), values.at(values.high)) if values.kind != "listed" else (values.low, values.high)
    margin = 0.06 * (ends[1] - ends[0]) or 0.5
    axis.set_xlim(ends[0] - margin, ends[1] + margin)
    if labelled:
        axis.set_xlabel(plain_label(values.label), fontsize=9, color=_SOFT)


def scale_colours(scales: Sequence[float]) -> dict[float, Any]:
    """Dark to light from the smallest scale to the largest; markers differ, too, for those who see no colours."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    last = max(len(scales) - 1, 1)
    return {scale: colours(0.82 * index / last) for index, scale in enumerate(scales)}


def scale_markers(scales: Sequence[float]) -> dict[float, str]:
    """A marker for each scale."""
    return {scale: MARKERS[index % len(MARKERS)] for index, scale in enumerate(scales)}
