"""The parametrization: roles and global dims, init, multipliers, LR / weight decay / epsilon rules."""

from typing import TYPE_CHECKING

from megadit.lazy import lazy_exports

if TYPE_CHECKING:
    from megadit.mup.spec import ParamSpec, param_specs

__all__ = ["ParamSpec", "param_specs"]

__getattr__ = lazy_exports(__name__, {"ParamSpec": "spec", "param_specs": "spec"})
