"""From measurements to slopes and a verdict per module.

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

A size that is rounding beside the module's own later ones is not reached yet and no part of a slope: see
``reached_sizes``. Unreached: a parameter's ``update``, a module's ``change`` or the ``pull`` that is never reached
within the steps. It is neither right nor wrong, so the module is named.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import linear_regression, median
from typing import Any, Literal

from megadit.mup.coord_check.record import OUTPUT, CoordMeasurement

GROWS = 0.3
SHRINKS = 0.6
ROUNDING = 1e-4  # measured: float32 noise of 6e-6 of the later sizes at most; real first steps not below 7e-3 of them
WINDOW = 4  # steps that the gradient may need to reach a layer, and one more; real sizes grow by 5^3 in that time
FLOAT32 = 2.0**-20  # eight times float32's epsilon

Series = tuple[int, int]  # width and seed


Sizes = tuple[tuple[int, float], ...]  # (width, mean size over seeds), widths ascending

ModuleStatus = Literal["ok", "unreached", "affected", "broken"]
CoordOutcome = Literal["passes", "broken", "not judged"]


@dataclass
class ModuleVerdict:
    """One module: ``slopes[quantity]`` is a list over steps, None where the quantity is not reached yet.

    ``reasons`` say what it does wrong itself, ``effects`` what it shows of a fault anywhere, ``unreached`` what of it
    never moved and so was not judged.
    """

    module: str
    role: str
    verdict: ModuleStatus = "ok"
    reasons: list[str] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    slopes: dict[str, list[float | None]] = field(default_factory=dict)

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
    def outcome(self) -> CoordOutcome:
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

    def to_json(self) -> dict[str, Any]:
        """Plain data: verdict, limits, widths, broken, modules."""
        return {
            "verdict": self.outcome,
            "limits": {"grows": GROWS, "shrinks": SHRINKS},
            "widths": self.widths,
            "broken": self.broken,
            "unreached": self.unreached,
            "modules": [
                asdict(module) | {"slopes": {name: list(map(_plain, slopes)) for name, slopes in module.slopes.items()}}
                for module in self.modules
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
    widths, values = zip(*sizes, strict=True)
    return linear_regression(list(map(math.log2, widths)), list(map(math.log2, values))).slope


def reached_sizes(measurements: Mapping[Series, Sequence[float]]) -> list[Sizes | None]:
    """The judged sizes of one quantity of one module by step, None where it is not reached yet.

    Behind a zero readout and zero gates a layer gets no gradient at first. What is read of it then is zero, or what
    two passes of the same weights differ by: the last bits of this machine's matrix products. A slope through such
    sizes tells of the library, not of the model. So a size is *not reached yet* as long as it, and each one before
    it, is

    - zero;
    - below ``ROUNDING`` of the sizes that the same quantity of the same module has within the next ``WINDOW`` steps
      (the median over widths and seeds, so that one width that dies or blows up decides nothing for the others); or
    - below ``FLOAT32`` at a step at which other widths read zero: the rounding of recordings made in float32.

    A quantity is judged from the first step on at which all widths and seeds that ever reach it have done so. A width
    that never does while others do counts as zero: it is dead, which is a fault. If none does, the quantity is never
    reached.

    Args:
        measurements: the quantity's sizes by step, of every width and seed.

    Raises:
        ValueError: the widths and seeds were not read at equally many steps.
    """
    counts = {len(sizes) for sizes in measurements.values()}
    if len(counts) != 1:
        raise ValueError(f"coordinates: widths and seeds were read at different numbers of steps ({sorted(counts)})")
    count = counts.pop()
    bounds = [_bound(measurements, step) for step in range(count)]
    begins = {series: _begin(sizes, bounds) for series, sizes in measurements.items()}
    first = max((begin for begin in begins.values() if begin < count), default=count)
    dead = {series for series, begin in begins.items() if begin == count}
    return [None if step < first else _means(measurements, step, dead) for step in range(count)]


def _bound(measurements: Mapping[Series, Sequence[float]], step: int) -> float:
    """The size up to which one of this step is rounding."""
    later = [
        max(filter(math.isfinite, sizes[step : step + WINDOW + 1]), default=0.0) for sizes in measurements.values()
    ]
    some_zero = any(sizes[step] == 0.0 for sizes in measurements.values())
    return max(ROUNDING * median(later), FLOAT32 if some_zero else 0.0)


def _begin(sizes: Sequence[float], bounds: Sequence[float]) -> int:
    """The first step that is above rounding; the number of steps if none is. What is not finite is above."""
    return next((i for i, (size, bound) in enumerate(zip(sizes, bounds, strict=True)) if not size <= bound), len(sizes))


def _means(measurements: Mapping[Series, Sequence[float]], step: int, dead: set[Series]) -> Sizes:
    """Means over seeds; zero at a width of which any seed is dead."""
    by_width: dict[int, list[float]] = {}
    for (width, _), sizes in sorted(measurements.items()):
        by_width.setdefault(width, []).append(sizes[step])
    widths_dead = {width for width, _ in dead}
    return tuple((w, 0.0 if w in widths_dead else sum(sizes) / len(sizes)) for w, sizes in by_width.items())


def judge(measurements: Iterable[CoordMeasurement]) -> CoordVerdict:
    """Slopes and verdicts of all modules, in the order in which they were read."""
    series: dict[tuple[str, str], dict[Series, list[float]]] = defaultdict(lambda: defaultdict(list))
    roles: dict[str, str] = {}
    widths: set[int] = set()
    for measurement in sorted(measurements, key=lambda measurement: measurement.step):
        series[measurement.module, measurement.quantity][measurement.width, measurement.seed].append(measurement.value)
        roles.setdefault(measurement.module, measurement.role)
        widths.add(measurement.width)
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
    wrong: ModuleStatus = "broken" if module.reasons else "affected"
    module.verdict = wrong if module.reasons or module.effects else "unreached" if module.unreached else "ok"


def _words(slope: float) -> str:
    if math.isinf(slope):
        return "is not finite at some width" if slope > 0 else "is zero at some widths"
    return f"{'grows' if slope > 0 else 'shrinks'} as width^{slope:.2f}"
