"""The table of the parametrization: init, forward multiplier, LR, weight decay and epsilon by role.

With m = width / base_width (arXiv 2505.15270 Table 1 and appendix B; arXiv 2203.03466 Table 8, the form
in which only the readout has a multiplier):

=======  =================================  =============  ============  ==========================
role     shape                              init std       LR            forward multiplier
=======  =================================  =============  ============  ==========================
input    (infinite out, finite in), tables  constant       eta           1
hidden   (infinite out, infinite in)        ~ 1/sqrt(m)    eta / m       1
vector   (infinite): biases, gains          constant       eta           --
output   (finite out, infinite in)          constant       eta           output_mult / m
finite   no infinite dimension              constant       eta           1
=======  =================================  =============  ============  ==========================

Under SP every factor is 1 and a std is evaluated at the actual dims. Under muP it is evaluated at the
*base* dims and then scaled as above, so that at m = 1 the two are one model, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from megadit.config.schema.model import ModelConfig
from megadit.mup.spec import Dim, ParamSpec, Role

WdMode = Literal["independent", "constant", "sqrt"]
EpsMode = Literal["constant", "scaled"]
Purpose = Literal[
    "linear",
    "patch",
    "patch_bias",
    "timestep",
    "text",
    "table",
    "tokens",
    "modulation_table",
    "adaln",
    "readout",
    "zero",
    "one",
]


@dataclass(frozen=True)
class InitRule:
    """How a start is drawn: ``value`` is sigma for fan_in, the std for normal, the constant for constant.

    ``per_tap``: of a convolution's weight the fan-out is counted once per tap of its window, as torch counts 4-D
    tensors.
    """

    kind: Literal["fan_in", "xavier_uniform", "kaiming_uniform", "inverse_sqrt_fan_out", "normal", "constant"]
    value: float = 1.0
    per_tap: bool = False

    @property
    def uniform(self) -> bool:
        """Whether the distribution is uniform rather than normal."""
        return self.kind in ("xavier_uniform", "kaiming_uniform")

    def std(self, fan_in: int, fan_out: int) -> float:
        """Standard deviation at these fans; 0 for a constant start."""
        if self.kind == "fan_in":
            return self.value / math.sqrt(fan_in)
        if self.kind == "xavier_uniform":
            return self.value * math.sqrt(2.0 / (fan_in + fan_out))
        if self.kind == "kaiming_uniform":  # torch's default of linears and convolutions: bound 1/sqrt(fan_in)
            return self.value / math.sqrt(3.0 * fan_in)
        if self.kind == "inverse_sqrt_fan_out":
            return self.value / math.sqrt(fan_out)
        return self.value if self.kind == "normal" else 0.0


XAVIER = InitRule("xavier_uniform", 1.0)
SMALL = InitRule("normal", 0.02)
_ZERO = InitRule("constant", 0.0)
_FAN_IN = InitRule("fan_in", 1.0)
# The paper's DiT-muP: 1/sqrt(fan_in) throughout, labels N(0, 1).
FAN_IN_SCHEME: Mapping[str, InitRule] = MappingProxyType(
    {"linear": _FAN_IN, "patch": _FAN_IN, "timestep": _FAN_IN, "text": _FAN_IN, "table": InitRule("normal", 1.0)}
)


def wd_mult(spec: ParamSpec, mode: WdMode = "independent", wd_vectors: bool = False) -> float:
    """Factor on the base weight decay of an AdamW that decays by lr * wd.

    ``independent`` keeps lr * wd constant in width (hidden: times m, as mup.MuAdamW); ``constant`` keeps wd
    itself (arXiv 2505.15270 B.4 read literally); ``sqrt`` lies between. Vectors and tables decay only if
    ``wd_vectors``.
    """
    if not (spec.decay or wd_vectors):
        return 0.0
    if spec.role != "hidden" or mode == "constant":
        return 1.0
    return spec.fan_in_mult if mode == "independent" else math.sqrt(spec.fan_in_mult)


def eps_mult(spec: ParamSpec, mode: EpsMode = "constant") -> float:
    """Factor on Adam's base epsilon; ``scaled`` follows the gradient's entries, 1/m wherever a dimension grows."""
    return 1.0 if mode == "constant" else 1.0 / spec.width_mult


def clip_mult(spec: ParamSpec) -> float:
    """How the norm of the parameter's gradient scales with width, and so a threshold that clips alike at every width.

    Under muP the residual stream has entries of size 1 and its gradient entries of size 1/m, that is norms sqrt(m)
    and 1/sqrt(m). The gradient of a hidden weight is a product of the two: 1. Input weights, tables and vectors see
    the second beside something of fixed size, the readout the first times its multiplier 1/m: 1/sqrt(m). Finite
    parameters have a fixed number of entries of fixed size: 1. Measured by tests/engine/test_clip_scaling.py.
    """
    return 1.0 if spec.role in ("hidden", "finite") else 1.0 / math.sqrt(spec.width_mult)


class Parametrization:
    """The resolved rules of one model: what a layer asks for its dims and specs while it is built."""

    def __init__(self, config: ModelConfig, scheme: Mapping[str, InitRule]) -> None:
        """``scheme``: initial values by purpose; those of the purposes that it leaves out are the same in all."""
        self.mup = config.parametrization == "mup"
        self.width = config.width
        # Under SP a model is its own base, so that every ratio is 1.
        self.base_width = config.base_width if self.mup and config.base_width else config.width
        self.output_mult = config.output_mult
        self.role_hps = config.role_hps
        self._init: Mapping[str, InitRule] = MappingProxyType(
            {
                "tokens": SMALL,
                "patch_bias": _ZERO,
                "modulation_table": SMALL,
                "readout": _ZERO,
                "adaln": _ZERO if config.adaln_zero else _FAN_IN,
                **{key: rule for key, rule in scheme.items() if key != "adaln" or config.adaln_init == "auto"},
                "zero": _ZERO,
                "one": InitRule("constant", 1.0),
            }
        )

    def width_dim(self, multiple: float | Fraction = 1) -> Dim:
        """The dimension ``multiple`` x width (rounded down, as the originals do for mlp_ratio)."""
        return Dim(int(self.width * multiple), int(self.base_width * multiple))

    def spec(
        self,
        dims: Sequence[Dim],
        purpose: Purpose | InitRule,
        *,
        role: Role | None = None,
        table: bool = False,
        drawn_fan_in: int | None = None,
    ) -> ParamSpec:
        """Spec of a parameter of global ``dims``.

        A vector has one dim; a matrix is (out, in, *window) with fan_in = in x window; a ``table`` is
        (..., entries, channels), whose rows are looked up or added: an input layer of one-hot fan-in, never decayed
        by default. ``purpose`` chooses the initial values by the scheme, or says them. ``role`` overrides the one that
        the dims imply. ``drawn_fan_in``: of a bias, the finite fan-in of its weight, by which torch draws it.
        """
        dims = tuple(dims)
        role = role or _role_of(dims, table)
        fan_in, fan_out = _fans(dims, table, base=False)
        base_fan_in, base_fan_out = _fans(dims, table, base=True)
        rule = purpose if isinstance(purpose, InitRule) else self._init[purpose]
        hps = getattr(self.role_hps, role)
        taps = math.prod(dim.size for dim in dims[2:]) if rule.per_tap else 1
        std = rule.std(drawn_fan_in or base_fan_in, base_fan_out * taps)
        ratio = fan_in / base_fan_in
        if role == "hidden":
            std *= math.sqrt(base_fan_in / fan_in)
        matrix = len(dims) > 1 and not table
        forward_mult = hps.mult if len(dims) > 1 else 1.0
        if role == "output" and matrix:
            forward_mult = (self.output_mult if purpose == "readout" else hps.mult) / ratio
        decay = matrix
        return ParamSpec(
            role=role,
            fan_in=fan_in,
            fan_out=fan_out,
            base_fan_in=base_fan_in,
            base_fan_out=base_fan_out,
            init_std=std * hps.init_std,
            forward_mult=forward_mult,
            lr_mult=hps.lr / ratio if role == "hidden" else hps.lr,
            wd_mult=(ratio if role == "hidden" else 1.0) if decay else 0.0,
            eps_mult=1.0,
            shape=tuple(dim.size for dim in dims),
            base_shape=tuple(dim.base for dim in dims),
            init_dist="uniform" if rule.uniform else "normal",
            init_value=rule.value if rule.kind == "constant" else 0.0,
            decay=decay,
        )


def _role_of(dims: tuple[Dim, ...], table: bool) -> Role:
    """The role that the infinite dimensions imply; a table is read by row, so its channels are its fan-out."""
    if not any(dim.infinite for dim in dims):
        return "finite"
    if len(dims) == 1:
        return "vector"
    if table:
        return "input"
    fan_out, fan_in = dims[0].infinite, any(dim.infinite for dim in dims[1:])
    if fan_out and fan_in:
        return "hidden"
    return "input" if fan_out else "output"


def _fans(dims: tuple[Dim, ...], table: bool, *, base: bool) -> tuple[int, int]:
    """(fan_in, fan_out) at the actual or the base size; a vector and a table's row are looked up with fan-in 1."""
    sizes = [dim.base_size if base else dim.size for dim in dims]
    if len(sizes) == 1:
        return 1, sizes[0]
    if table:
        return 1, sizes[-1]
    return math.prod(sizes[1:]), sizes[0]
