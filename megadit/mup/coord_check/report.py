"""A coordinate check's results as files (coords.csv, verdict.json, coord_check.png) and as text."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from megadit.files.text import plain_label
from megadit.mup.coord_check.record import CoordMeasurement
from megadit.mup.coord_check.verdict import GROWS, SHRINKS, CoordVerdict, ModuleVerdict
from megadit.tables import aligned

_COLUMNS = ("activation", "change", "gain", "update.weight", "update.bias")
_PANELS = {
    "activation": "|activation|",
    "change": "|change since step 0|",
    "update.weight": "|update by weight| / |input|",
    "update.bias": "|update by bias|",
}


def write_report(
    folder: Path, measurements: Sequence[CoordMeasurement], verdict: CoordVerdict, title: str = ""
) -> dict[str, Any]:
    """Write the three files into ``folder`` (made if absent) and return the verdict as plain data.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = [field.name for field in dataclasses.fields(CoordMeasurement)]
    with open(folder / "coords.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([getattr(measurement, name) for name in fields] for measurement in measurements)
    plain = verdict.to_json()
    (folder / "verdict.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot_coordinates(measurements, verdict, folder / "coord_check.png", title)
    return plain


def format_verdict(verdict: CoordVerdict) -> str:
    """A table of slopes, one module a line, then what is wrong and the overall verdict."""
    cells = [
        [module.module, module.role, *(_cell(module, column) for column in _COLUMNS), module.verdict]
        for module in verdict.modules
    ]
    lines = [
        f"slopes of log2 size against log2 width ({', '.join(map(str, verdict.widths))}); "
        f"wrong above {GROWS:+g}, updates also below {-SHRINKS:+g}",
        aligned(["module", "role", *_COLUMNS, "verdict"], cells, left=2),
        "",
    ]
    for module in verdict.modules:
        if module.reasons:
            lines.append(f"{module.module} is broken: {'; '.join(module.reasons)}")
        elif module.effects and not verdict.broken:
            lines.append(f"{module.module}: {'; '.join(module.effects)}")
    lines += [_not_judged(module) for module in verdict.modules if module.unreached]
    lines.append(f"verdict: {verdict.outcome}")
    return "\n".join(lines)


def _not_judged(module: ModuleVerdict) -> str:
    names = ", ".join(quantity.replace("update.", "update of ") for quantity in module.unreached)
    return (
        f"{module.module} is not judged: training does not reach it within the steps ({names}); take more --steps, "
        "unless nothing that it computes is used"
    )


def _cell(module: ModuleVerdict, quantity: str) -> str:
    """The slope that was judged: growth, or the first one where that is the lower by far."""
    growth, first = module.growth(quantity), module.first(quantity)
    if growth is None or first is None:
        return "-"
    return f"{first if first < -SHRINKS else growth:+.2f}"


def module_kind(name: str) -> str:
    """A module's name without its block's number: all blocks share a panel."""
    return re.sub(r"\b(\w*blocks)\.\d+", r"\1.*", name)


def plot_coordinates(
    measurements: Sequence[CoordMeasurement], verdict: CoordVerdict, path: str | os.PathLike[str], title: str = ""
) -> None:
    """Write a PNG: rows are kinds of modules (means over blocks and seeds), columns quantities, both axes log2.

    Flat lines are right. The name of a kind with a broken module is red, with an affected one orange.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    curves = _curves(measurements)
    kinds = list(dict.fromkeys(module_kind(module.module) for module in verdict.modules))
    steps = sorted({measurement.step for measurement in measurements})
    figure = Figure(figsize=(9.5, 1.45 * len(kinds) + 1.0), layout="constrained")
    axes: Any = figure.subplots(len(kinds), len(_PANELS), squeeze=False)
    colours = matplotlib.colormaps["viridis"]
    for row, kind in enumerate(kinds):
        for column, (quantity, label) in enumerate(_PANELS.items()):
            axis = axes[row][column]
            for step in steps:
                points = [(w, v) for w, v in curves[kind, quantity].get(step, []) if v > 0 and isfinite(v)]
                if points:
                    colour = colours(step / max(steps[-1], 1))
                    axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=2.5, linewidth=1.1)
            _style_axis(axis, verdict.widths)
            if row == 0:
                axis.set_title(label, fontsize=8.5)
        axes[row][0].set_ylabel(_wrapped(kind), fontsize=8, color=_colour(kind, verdict))
    _legend(figure, steps, colours)
    named = ": " + (", ".join(verdict.broken[:4]) or "the output") if verdict.outcome == "broken" else ""
    outcome = verdict.outcome + named
    more = f" and {len(verdict.broken) - 4} more" if len(verdict.broken) > 4 else ""
    figure.suptitle(plain_label(f"{title}: {outcome}{more}" if title else outcome + more), fontsize=11)
    figure.supxlabel("width", fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def _curves(measurements: Sequence[CoordMeasurement]) -> dict[tuple[str, str], dict[int, list[tuple[int, float]]]]:
    """Mean over blocks and seeds: (kind, quantity) -> step -> [(width, size)]."""
    values: dict[tuple[str, str, int, int], list[float]] = defaultdict(list)
    for r in measurements:
        values[module_kind(r.module), r.quantity, r.step, r.width].append(r.value)
    curves: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for (kind, quantity, step, width), sizes in sorted(values.items()):
        curves[kind, quantity][step].append((width, sum(sizes) / len(sizes)))
    return curves


def _colour(kind: str, verdict: CoordVerdict) -> str:
    statuses = {module.verdict for module in verdict.modules if module_kind(module.module) == kind}
    return "crimson" if "broken" in statuses else "darkorange" if "affected" in statuses else "black"


def _wrapped(kind: str) -> str:
    """A long dotted name over two or three lines."""
    return kind.replace("blocks.*.", "blocks.*\n").replace("_embedder.", "_embedder\n").replace("_layer.", "_layer\n")


def _style_axis(axis: Any, widths: Sequence[int]) -> None:
    """Axes of one panel: log2 both ways, at least four powers of two high so that flat looks flat."""
    if not axis.lines:
        axis.set_axis_off()
        return
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    low, high = axis.get_ylim()
    if high / low < 16:
        middle = (low * high) ** 0.5
        axis.set_ylim(middle / 4, middle * 4)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.tick_params(labelsize=6.5)
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _legend(figure: Any, steps: Sequence[int], colours: Any) -> None:
    from matplotlib.lines import Line2D

    shown = steps if len(steps) <= 12 else [steps[i * (len(steps) - 1) // 11] for i in range(12)]
    lines = [Line2D([], [], color=colours(step / max(steps[-1], 1)), label=f"step {step}") for step in shown]
    figure.legend(handles=lines, loc="outside right center", fontsize=7, frameon=False)
