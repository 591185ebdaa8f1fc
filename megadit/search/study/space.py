"""The searched space: each dimension as the configuration takes its values, and the points that samplers choose.

Every point is a function of the sampler's seed and the point's number alone, so that it does not depend on the
workers, on what has finished, or on how many points are asked for: more trials go on with the same sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from megadit.config import RunConfig
from megadit.config.schema.section import options, section_of, unknown_key, walk
from megadit.errors import UserError
from megadit.search.study.spec import LISTED, DimensionSpec, as_config_value

HPValues = dict[str, Any]

_DIGITS = 6  # significant digits of drawn values: finer than any search, and readable in tables
_DRAWS_PER_POINT = 64  # draws after which a listed space is taken to be used up


@dataclass(frozen=True)
class Dimension:
    """One searched key. ``values`` are the listed values, or low and high of a range; ``integer``: whole numbers."""

    key: str
    kind: str
    values: tuple[Any, ...]
    integer: bool

    @property
    def listed(self) -> bool:
        """Whether it is a grid or a choice rather than a range."""
        return self.kind in LISTED

    @property
    def numeric(self) -> bool:
        """Whether all its values are numbers, so that it has an order and an axis."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def distribution(self) -> Any:
        """optuna's, from the lowest to the highest of its numbers."""
        from optuna.distributions import FloatDistribution, IntDistribution

        kind = IntDistribution if self.integer else FloatDistribution
        return kind(min(self.values), max(self.values), log=self.kind == "log_uniform")

    def suggest(self, trial: Any) -> Any:
        """The value that an optuna trial draws; of a listed dimension it draws the position in the list."""
        if self.listed:
            return self.values[trial.suggest_categorical(self.key, range(len(self.values)))]
        suggest = trial.suggest_int if self.integer else trial.suggest_float
        return suggest(self.key, *self.values, log=self.kind == "log_uniform")

    def at(self, u: float) -> Any:
        """The value at the quantile ``u`` in [0, 1] of the dimension's distribution."""
        if self.listed:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        # Whole numbers get half a unit at both ends, so that the bounds are as likely as the rest.
        margin = 0.5 if self.integer else 0.0
        low, high = low - margin, high + margin
        if self.kind == "log_uniform":
            value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            value = low + u * (high - low)
        value = round(value) if self.integer else float(f"{value:.{_DIGITS}g}")
        return min(max(value, self.values[0]), self.values[1])


@dataclass(frozen=True)
class Space:
    """The searched dimensions, in the order of the study file."""

    dimensions: tuple[Dimension, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The searched configuration keys."""
        return tuple(dimension.key for dimension in self.dimensions)

    @property
    def size(self) -> int | None:
        """How many points there are; None when a dimension is a range."""
        listed = all(dimension.listed for dimension in self.dimensions)
        return math.prod(len(dimension.values) for dimension in self.dimensions) if listed else None

    def dimension(self, key: str) -> Dimension:
        """The dimension of the searched key ``key``."""
        return next(dimension for dimension in self.dimensions if dimension.key == key)

    def at(self, quantiles: Iterable[float]) -> HPValues:
        """The point at one quantile per dimension."""
        return {dimension.key: dimension.at(u) for dimension, u in zip(self.dimensions, quantiles, strict=True)}

    def grid(self) -> list[HPValues]:
        """Every point, the last dimension fastest; all dimensions are listed ones."""
        lists = [dimension.values for dimension in self.dimensions]
        return [dict(zip(self.keys, values, strict=True)) for values in itertools.product(*lists)]

    def corners(self) -> Iterator[HPValues]:
        """A first point and, one dimension at a time, every other listed value or bound: for checking them."""
        first = {dimension.key: dimension.values[0] for dimension in self.dimensions}
        yield first
        for dimension in self.dimensions:
            for value in dimension.values[1:]:
                yield first | {dimension.key: value}

    def random(self, count: int, seed: int) -> list[HPValues]:
        """The first ``count`` different points of the random sequence of ``seed``."""
        from megadit.rng import stream_key, uniform

        def draw(number: int) -> HPValues:
            # 1 - u: the generator draws from (0, 1], but quantiles of lists are from [0, 1).
            return self.at(1.0 - float(uniform(stream_key(seed, "search", key, number), ())) for key in self.keys)

        return self._distinct(map(draw, itertools.count()), count)

    def quasi_random(self, count: int, seed: int) -> list[HPValues]:
        """The first ``count`` different points of the scrambled Sobol sequence of ``seed``; optuna has the same."""
        from scipy.stats.qmc import Sobol

        sequence = Sobol(len(self.keys), scramble=True, seed=seed)
        return self._distinct((self.at(sequence.random(1)[0].tolist()) for _ in itertools.count()), count)

    def _distinct(self, points: Iterator[HPValues], count: int) -> list[HPValues]:
        """The first ``count`` different points. Raises UserError when a listed space has fewer."""
        size = self.size
        if size is not None and count > size:
            raise UserError(
                f"trials: {count} is more than the {size} points of the space; lower it, or use sampler grid"
            )
        distinct: dict[str, HPValues] = {}
        for point in itertools.islice(points, None if size is None else _DRAWS_PER_POINT * size):
            distinct.setdefault(repr(point), point)
            if len(distinct) == count:
                return list(distinct.values())
        raise UserError(f"trials: {count} of the {size} points of the space are not found; use sampler grid")


def build_space(spec: Mapping[str, DimensionSpec]) -> Space:
    """The space of a study, its values as the configuration takes them. Raises UserError for keys it has not."""
    fields = dict(walk(RunConfig))
    return Space(tuple(_dimension(key, dimension, fields) for key, dimension in spec.items()))


def _dimension(key: str, spec: DimensionSpec, fields: Mapping[str, FieldInfo]) -> Dimension:
    if key not in fields:
        raise UserError(f"space.{unknown_key(key, RunConfig)}")
    field = fields[key]
    kinds = options(field.annotation)
    if section_of(field.annotation) is not None:
        inner = ", ".join(name for name in fields if name.rpartition(".")[0] == key)
        raise UserError(f"space.{key}: is a section; search one of {inner}")
    integer = int in kinds and float not in kinds
    values = [as_config_value(key, value) for value in spec.values]
    if float in kinds:  # as the configuration will hold them, so that 1 and 1.0 are one value
        values = [float(value) if type(value) is int else value for value in values]
    elif spec.kind not in LISTED:
        if not integer:
            raise UserError(f"space.{key}: {spec.kind} is for numbers, which {key} is not; use choice")
        for value in values:
            if not float(value).is_integer():
                raise UserError(f"space.{key}: {value} is not a whole number, which {key} takes; round the bound")
        values = [int(value) for value in values]
    return Dimension(key, spec.kind, tuple(values), integer)
