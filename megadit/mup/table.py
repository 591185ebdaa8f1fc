"""The parametrization as a table that people and scripts read: one row per parameter, or per kind of parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from megadit.config.schema.model import Role
from megadit.config.schema.optim import OptimConfig
from megadit.mup.rules import clip_mult, eps_mult, wd_mult
from megadit.mup.spec import ParamSpec, param_specs
from megadit.tables import aligned

_BLOCK = re.compile(r"(?<![^.])(\w*blocks)\.\d+\.")  # blocks.7., in_blocks.3., joint_blocks.0.
_ROLES: tuple[Role, ...] = get_args(Role)
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


def by_role(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``rows``' result ordered by role; rows that differ only in the number of their block are one.

    Its name then holds ``*`` for the number and how many parameters it stands for: ``blocks.*.mlp.fc1.weight ×28``.
    """
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        values = (tuple(value) if isinstance(value, list) else value for key, value in row.items() if key != "name")
        kinds.setdefault((_BLOCK.sub(r"\1.*.", row["name"]), *values), []).append(row)
    merged = [
        {**members[0], "name": f"{kind[0]} ×{len(members)}"} if len(members) > 1 else dict(members[0])
        for kind, members in kinds.items()
    ]
    return sorted(merged, key=lambda row: _ROLES.index(row["role"]))


def format_rows(table: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text of the result of ``rows`` or ``by_role``: a header, a rule and one line per row."""
    cells = [[_cell(row[column]) for column in COLUMNS] for row in table]
    return aligned(COLUMNS, cells, left=3, rule=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "x".join(str(size) for size in value) if isinstance(value, list) else str(value)
