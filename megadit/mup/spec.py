"""What the library knows about a parameter: its role, global dims and base-unit factors.

The record lives on the layer object, by local parameter name, in *global* dimensions that the layer
declares when it is built. It never comes from a tensor's shape: tensor-parallel shards, ZeRO-3
placeholders, ``copy.deepcopy`` and ``to_empty`` all lose or falsify what a shape or a tensor attribute says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from megadit.slices import ShardRegions

if TYPE_CHECKING:
    from torch import nn

Role = Literal["input", "hidden", "vector", "output", "finite"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Dim:
    """One global dimension. ``base`` is its size in the base model; None says that it does not grow with width."""

    size: int
    base: int | None = None

    @property
    def infinite(self) -> bool:
        """Whether this dimension grows with width."""
        return self.base is not None

    @property
    def mult(self) -> float:
        """Size over base size; 1 for a finite dimension."""
        return 1.0 if self.base is None else self.size / self.base

    @property
    def base_size(self) -> int:
        """Size in the base model; a finite dimension is the same in every model."""
        return self.size if self.base is None else self.base


@dataclass(frozen=True)
class ParamSpec:
    """One parameter under a resolved parametrization. All sizes are global, all factors dimensionless.

    ``init_std`` 0 means a constant start at ``init_value``. ``forward_mult`` multiplies the layer's input
    (for a table: its output). ``lr_mult``, ``wd_mult`` and ``eps_mult`` multiply the optimizer's base
    values; the last two are those of the default modes, see ``megadit.mup.rules`` for the others.
    ``base_shape`` is written as the mup package does: None marks a finite dimension.
    """

    role: Role
    fan_in: int
    fan_out: int
    base_fan_in: int
    base_fan_out: int
    init_std: float
    forward_mult: float
    lr_mult: float
    wd_mult: float
    eps_mult: float
    shape: tuple[int, ...]
    base_shape: tuple[int | None, ...]
    init_dist: Literal["normal", "uniform"] = "normal"
    init_value: float = 0.0
    decay: bool = True

    @property
    def width_mult(self) -> float:
        """Ratio to the base model of the last infinite dimension (fan-in of a hidden weight); 1 if there is none."""
        for size, base in zip(reversed(self.shape), reversed(self.base_shape), strict=True):
            if base is not None:
                return size / base
        return 1.0

    @property
    def fan_in_mult(self) -> float:
        """Fan-in over base fan-in."""
        return self.fan_in / self.base_fan_in

    @property
    def numel(self) -> int:
        """Global number of elements."""
        return math.prod(self.shape)


def walk_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """Yield (canonical name, parameter, spec) in the order of ``named_parameters``.

    Raises:
        LookupError: a parameter whose module declares no spec for it.
    """
    for name, param, spec, _ in walk_slices(model):
        yield name, param, spec


def walk_slices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec, ShardRegions | None]]:
    """``walk_specs`` with the slice of the parameter that this rank holds (the module's ``param_regions``; None: all).

    Raises:
        LookupError: a parameter whose module declares no spec for it.
    """
    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        owner, _, local = name.rpartition(".")
        declared: dict[str, ParamSpec] = getattr(modules[owner], "param_specs", {})
        if local not in declared:
            raise LookupError(
                f"parameter {name} of {type(modules[owner]).__name__} has no ParamSpec; "
                f"declare it in the module's param_specs when it is built"
            )
        shard_regions: dict[str, ShardRegions] = getattr(modules[owner], "param_regions", {})
        yield name, param, declared[local], shard_regions.get(local)


def param_specs(model: nn.Module) -> dict[str, ParamSpec]:
    """Spec of every parameter by canonical name, in the order of ``named_parameters``.

    Raises:
        LookupError: a parameter whose module declares no spec for it.
    """
    return {name: spec for name, _, spec in walk_specs(model)}
