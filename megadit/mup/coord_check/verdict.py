"""From readings to slopes and a verdict per module.

A slope is that of log2(size) against log2(width), sizes averaged over seeds. A wrong rule of the table bends
it by at least 1/2 (an incoherent sum of n terms grows as n^1/2, a coherent one as n); at the widths that one
checks, correct rules drift by up to .2. ``GROWS`` lies between.

Broken, by the layer's own doing:
- ``gain`` at the start grows, or shrinks: the init std is wrong. A readout alone may shrink: muP wants it to.
- an ``update`` grows: learning rate or multiplier are too large; the wide model diverges.
- the projector's ``pull`` grows: REPA takes over what its block learns as the model gets wider.
- an ``update`` shrinks: they are too small; the wide model stops learning there. Here a wrong rule costs a whole
  power of width, while a rate that is very large for the narrow models costs up to half a power by itself
  (inputs move away from what was learnt): ``SHRINKS`` lies between.

Affected: the module's ``activation`` or ``change`` grows, or the model's output changes less as it gets wider,
without a fault of its own; the fault is in another module.

Growth is asked at the first step that moves the quantity, and of the median over steps; shrinking at the first
only, or where most steps read zero at some width. Single late steps are not asked: a rate that is large for the narrow
models bends them either way.

A size that is rounding beside the module's own later ones is not reached yet and no part of a slope: ``coord_reach``
says which. Unreached: a parameter's ``update``, a module's ``change`` or the ``pull`` that is never reached within the
steps. It is neither right nor wrong, so the module is named.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from megadit.mup.coord_check.reach import Series, reached_sizes
from megadit.mup.coord_check.record import OUTPUT, Reading

GROWS = 0.3
SHRINKS = 0.6

Verdict = Literal["ok", "unreached", "affected", "broken"]
Outcome = Literal["passes", "broken", "not judged"]


@dataclass
class ModuleVerdict:
    """One module: ``slopes[quantity]`` is a list over steps, None where the quantity is not reached yet.

    ``reasons`` say what it does wrong itself, ``effects`` what it shows of a fault anywhere, ``unreached`` what of it
    never moved and so was not judged.
    """

    module: str
    role: str
    verdict: Verdict = "ok"
    slopes: dict[str, list[float | None]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    @property
    def updates(self) -> list[str]:
        """The update quantities of this layer, one per parameter."""
        return [quantity for quantity in self.slopes if quantity.startswith("update.")]

    @property
    def moving(self) -> dict[str, bool]:
        """Of every quantity that training moves, whether it was reached."""
        moved = [*self.updates, *(name for name in ("change", "pull") if name in self.slopes)]
        return {name: any(slope is not None for slope in self.slopes[name]) for name in moved}

    def growth(self, quantity: str) -> float | None:
        """The larger of the first and the median slope over steps; None if it was zero throughout or is not read.

        Infinite if any size at any step was not finite.
        """
        values = [slope for slope in self.slopes.get(quantity, []) if slope is not None]
        if not values or math.inf in values:
            return math.inf if values else None
        return max(values[0], median(values))

    def first(self, quantity: str) -> float | None:
        """The slope at the first step at which the quantity is reached."""
        return next((slope for slope in self.slopes.get(quantity, []) if slope is not None), None)

    def shrinkage(self, quantity: str) -> float | None:
        """The first slope; -infinite if most steps read zero at some width; None as ``growth``."""
        values = [slope for slope in self.slopes.get(quantity, []) if slope is not None]
        return min(values[0], -math.inf if median(values) == -math.inf else values[0]) if values else None


@dataclass
class CoordVerdict:
    """The whole check: ``passed`` if no module that was judged is wrong, and any was judged."""

    modules: list[ModuleVerdict]
    widths: list[int]

    @property
    def passed(self) -> bool:
        """Whether no module is broken or affected, and training reached one of them."""
        return self.outcome == "passes"

    @property
    def outcome(self) -> Outcome:
        """The verdict in words; "not judged" if nothing moved, so that nothing was seen of how it learns."""
        if any(module.verdict in ("broken", "affected") for module in self.modules):
            return "broken"
        reached = [value for module in self.modules for value in module.moving.values()]
        return "passes" if any(reached) or not reached else "not judged"

    @property
    def unreached(self) -> list[str]:
        """Modules of which something was never reached, in the model's order."""
        return [module.module for module in self.modules if module.unreached]

    @property
    def broken(self) -> list[str]:
        """Modules at fault themselves, in the model's order."""
        return [module.module for module in self.modules if module.verdict == "broken"]

    def as_json(self) -> dict[str, Any]:
        """Plain data: verdict, limits, widths, broken, modules."""
        return {
            "verdict": self.outcome,
            "limits": {"grows": GROWS, "shrinks": SHRINKS},
            "widths": self.widths,
            "broken": self.broken,
            "unreached": self.unreached,
            "modules": [
                {
                    "module": m.module,
                    "role": m.role,
                    "verdict": m.verdict,
                    "reasons": m.reasons,
                    "effects": m.effects,
                    "unreached": m.unreached,
                    "slopes": {quantity: [_plain(s) for s in values] for quantity, values in m.slopes.items()},
                }
                for m in self.modules
            ],
        }


def _plain(slope: float | None) -> float | str | None:
    """A JSON value: infinities and NaN in words."""
    return slope if slope is None or math.isfinite(slope) else str(slope)


def fit_slope(sizes: Sequence[tuple[int, float]]) -> float | None:
    """Least-squares slope of log2(size) on log2(width) over (width, size).

    None if all sizes are zero; infinite if a size is not finite (it blew up); -infinite if only some are zero.
    """
    if any(not math.isfinite(size) for _, size in sizes):
        return math.inf
    zeros = sum(size == 0.0 for _, size in sizes)
    if zeros:
        return None if zeros == len(sizes) else -math.inf
    points = [(math.log2(width), math.log2(size)) for width, size in sizes]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def judge(readings: Iterable[Reading]) -> CoordVerdict:
    """Slopes and verdicts of all modules, in the order in which they were read."""
    series: dict[tuple[str, str], dict[Series, list[float]]] = defaultdict(lambda: defaultdict(list))
    roles: dict[str, str] = {}
    widths: set[int] = set()
    for reading in sorted(readings, key=lambda reading: reading.step):
        series[reading.module, reading.quantity][reading.width, reading.seed].append(reading.value)
        roles.setdefault(reading.module, reading.role)
        widths.add(reading.width)
    verdicts = {name: ModuleVerdict(name, role) for name, role in roles.items()}
    for (name, quantity), sizes in series.items():
        steps = reached_sizes(sizes)
        verdicts[name].slopes[quantity] = [None if step is None else fit_slope(step) for step in steps]
    for verdict in verdicts.values():
        _decide(verdict)
    return CoordVerdict(list(verdicts.values()), sorted(widths))


def _decide(module: ModuleVerdict) -> None:
    """Fill in ``reasons``, ``effects`` and ``verdict`` from the slopes."""
    gain = module.first("gain")
    if gain is not None and gain > GROWS:
        module.reasons.append(f"starts too large: gain {_words(gain)}")
    if gain is not None and gain < -GROWS and module.role != "output":
        module.reasons.append(f"starts too small: gain {_words(gain)}")
    for quantity in module.updates:
        parameter = quantity.removeprefix("update.")
        growth, shrinkage = module.growth(quantity), module.shrinkage(quantity)
        if growth is not None and growth > GROWS:
            module.reasons.append(f"{parameter} learns too fast: its update {_words(growth)}")
        if shrinkage is not None and shrinkage < -SHRINKS:
            module.reasons.append(f"{parameter} learns too slowly: its update {_words(shrinkage)}")
    pull = module.growth("pull")
    if pull is not None and pull > GROWS:
        module.reasons.append(f"pulls its block too hard: its gradient times the width {_words(pull)}")
    for quantity in ("activation", "change"):
        growth = module.growth(quantity)
        if growth is not None and growth > GROWS:
            module.effects.append(f"{quantity} {_words(growth)}")
    moved = module.shrinkage("change")
    if module.module == OUTPUT and moved is not None and moved < -SHRINKS:
        module.effects.append(f"change {_words(moved)}")
    module.unreached = [quantity for quantity, reached in module.moving.items() if not reached]
    wrong: Verdict = "broken" if module.reasons else "affected"
    module.verdict = wrong if module.reasons or module.effects else "unreached" if module.unreached else "ok"


def _words(slope: float) -> str:
    if math.isinf(slope):
        return "is not finite at some width" if slope > 0 else "is zero at some widths"
    return f"{'grows' if slope > 0 else 'shrinks'} as width^{slope:.2f}"
