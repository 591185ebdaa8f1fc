"""The parametrization: roles and global dims, init, multipliers, LR / weight decay / epsilon rules."""

from typing import TYPE_CHECKING

from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.mup.groups import GroupPlan, param_groups, plan_groups
    from megadit.mup.init import init_parameters, init_values
    from megadit.mup.interop import attach_infshapes, save_base_shapes
    from megadit.mup.rules import Parametrization, eps_mult, wd_mult
    from megadit.mup.spec import ROLES, Dim, ParamSpec, Role, param_specs, walk_specs

__all__ = [
    "ROLES",
    "Dim",
    "GroupPlan",
    "ParamSpec",
    "Parametrization",
    "Role",
    "attach_infshapes",
    "eps_mult",
    "init_parameters",
    "init_values",
    "param_groups",
    "param_specs",
    "plan_groups",
    "save_base_shapes",
    "walk_specs",
    "wd_mult",
]

__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("GroupPlan", "param_groups", "plan_groups"), "groups"),
        **dict.fromkeys(("init_parameters", "init_values"), "init"),
        **dict.fromkeys(("attach_infshapes", "save_base_shapes"), "interop"),
        **dict.fromkeys(("Parametrization", "eps_mult", "wd_mult"), "rules"),
        **dict.fromkeys(("ROLES", "Dim", "ParamSpec", "Role", "param_specs", "walk_specs"), "spec"),
    },
)
