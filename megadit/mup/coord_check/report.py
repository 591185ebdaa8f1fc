"""A coordinate check's results as files (coords.csv, verdict.json, coord_check.png) and as text."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadit.mup.coord_check.plot import plot_coordinates
from megadit.mup.coord_check.record import Reading
from megadit.mup.coord_check.verdict import GROWS, SHRINKS, CoordVerdict, ModuleVerdict

_COLUMNS = ("activation", "change", "gain", "update.weight", "update.bias")


def write_report(folder: Path, readings: Sequence[Reading], verdict: CoordVerdict, title: str = "") -> dict[str, Any]:
    """Write the three files into ``folder`` (made if absent) and return the verdict as plain data.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = [field.name for field in dataclasses.fields(Reading)]
    with open(folder / "coords.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([getattr(reading, name) for name in fields] for reading in readings)
    plain = verdict.as_json()
    (folder / "verdict.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot_coordinates(readings, verdict, folder / "coord_check.png", title)
    return plain


def format_verdict(verdict: CoordVerdict) -> str:
    """A table of slopes, one module a line, then what is wrong and the overall verdict."""
    names = [module.module for module in verdict.modules]
    width = max(map(len, names))
    lines = [
        f"slopes of log2 size against log2 width ({', '.join(map(str, verdict.widths))}); "
        f"wrong above {GROWS:+g}, updates also below {-SHRINKS:+g}",
        f"{'module':{width}}  {'role':7}" + "".join(f"{column:>15}" for column in _COLUMNS) + "  verdict",
    ]
    for module in verdict.modules:
        cells = "".join(f"{_cell(module, column):>15}" for column in _COLUMNS)
        lines.append(f"{module.module:{width}}  {module.role:7}{cells}  {module.verdict}")
    lines.append("")
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
