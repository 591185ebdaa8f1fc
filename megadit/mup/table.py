"""The parametrization as a table that people and scripts read: one row per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from megadit.config.optim import OptimConfig
from megadit.mup.rules import clip_mult, eps_mult, wd_mult
from megadit.mup.spec import ParamSpec, param_specs

COLUMNS = ("name", "role", "shape", "init_std", "forward_mult", "lr", "lr_mult", "wd", "eps", "clip_mult")


def rows(model: nn.Module | Mapping[str, ParamSpec], optim: OptimConfig) -> list[dict[str, Any]]:
    """One row per parameter with the keys of ``COLUMNS``; lr, wd and eps are what its optimizer group gets at peak."""
    specs = param_specs(model) if isinstance(model, nn.Module) else model
    return [
        {
            "name": name,
            "role": spec.role,
            "shape": list(spec.shape),
            "init_std": spec.init_std,
            "forward_mult": spec.forward_mult,
            "lr": optim.lr * spec.lr_mult,
            "lr_mult": spec.lr_mult,
            "wd": optim.weight_decay * wd_mult(spec, optim.wd_mode, optim.wd_vectors),
            "eps": optim.eps * eps_mult(spec, optim.eps_mode),
            "clip_mult": clip_mult(spec),
        }
        for name, spec in specs.items()
    ]


def format_rows(table: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text of ``rows``' result: a header, a rule and one line per parameter."""
    lines = [list(COLUMNS), *([_cell(row[column]) for column in COLUMNS] for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(_align(cell, i, widths[i]) for i, cell in enumerate(line)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


def _align(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "x".join(str(size) for size in value) if isinstance(value, list) else str(value)
