"""The optimizer's parameter groups: muP's learning rates as plain per-group scalars.

Groups are planned from specs alone, so every rank and pipeline stage makes the same named, ordered list,
whatever part of the model it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from megadit.config.schema.optim import OptimConfig
from megadit.mup.rules import clip_mult, eps_mult, wd_mult
from megadit.mup.spec import ROLES, ParamSpec, Role, param_specs


@dataclass(frozen=True)
class GroupPlan:
    """One optimizer group: parameters that share a role and all three multipliers."""

    name: str
    role: Role
    lr_mult: float
    wd_mult: float
    eps_mult: float
    param_names: tuple[str, ...]


def plan_groups(specs: Mapping[str, ParamSpec], optim: OptimConfig) -> list[GroupPlan]:
    """Sort parameters into groups: by role, decayed ones first, then by falling lr_mult.

    Names are the role, ``/no_decay`` for undecayed tables and matrices, and ``@<lr_mult>`` where one role
    has several width ratios (an mlp_ratio that is not an integer).
    """
    members: dict[tuple[Role, float, float, float], list[str]] = {}
    for name, spec in specs.items():
        key = (spec.role, spec.lr_mult, wd_mult(spec, optim.wd_mode, optim.wd_vectors), eps_mult(spec, optim.eps_mode))
        members.setdefault(key, []).append(name)
    keys = sorted(members, key=lambda key: (ROLES.index(key[0]), key[2] == 0.0, -key[1], key[2], key[3]))
    plans: list[GroupPlan] = []
    for key in keys:
        role, lr, wd, eps = key
        matrices = any(len(specs[name].shape) > 1 for name in members[key])
        name = f"{role}/no_decay" if matrices and wd == 0.0 else role
        if sum(_stem(other) == _stem(key) for other in keys) > 1:
            name = f"{name}@{lr:.9g}"
        plans.append(GroupPlan(name, role, lr, wd, eps, tuple(members[key])))
    return plans


def clip_mults(specs: Mapping[str, ParamSpec]) -> dict[Role, float]:
    """``clip_mult`` of each role that the model has, in the order of ``ROLES``.

    The width ratios within a role differ only where an mlp_ratio is no whole number, by rounding: the mean is taken.
    """
    members: dict[Role, list[float]] = {role: [] for role in ROLES}
    for spec in specs.values():
        members[spec.role].append(clip_mult(spec))
    return {role: sum(mults) / len(mults) for role, mults in members.items() if mults}


def _stem(key: tuple[Role, float, float, float]) -> tuple[Role, bool]:
    return key[0], key[2] == 0.0


def param_groups(
    model: nn.Module, optim: OptimConfig, specs: Mapping[str, ParamSpec] | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: ``params`` plus name, param_names, the multipliers, lr, weight_decay and eps.

    ``specs`` are those of the whole model when ``model`` is only a part of it; parameters that are not here
    are left out, which may leave a group empty. Frozen parameters are left out too.
    """
    here = {name: param for name, param in model.named_parameters() if param.requires_grad}
    groups: list[dict[str, Any]] = []
    for plan in plan_groups(param_specs(model) if specs is None else specs, optim):
        names = [name for name in plan.param_names if name in here]
        groups.append(
            {
                "name": plan.name,
                "role": plan.role,
                "params": [here[name] for name in names],
                "param_names": names,
                "lr_mult": plan.lr_mult,
                "wd_mult": plan.wd_mult,
                "eps_mult": plan.eps_mult,
                "lr": optim.lr * plan.lr_mult,
                "weight_decay": optim.weight_decay * plan.wd_mult,
                "eps": optim.eps * plan.eps_mult,
            }
        )
    return groups
