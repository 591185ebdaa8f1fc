"""The runs of a study: every point, cell and seed, in the order in which they are started."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megadit.search.study.space import HPValues
from megadit.search.study.study import Cell, Study


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class PlannedTrial:
    """One training run. ``key`` says which, whatever else the study holds; ``number`` is its place in the plan.

    A plan that grows (more seeds, points or values) keeps the keys and moves the numbers.
    """

    number: int
    key: str
    variant: str
    scale: int | None = None
    hps: dict[str, Any]
    seed: int

    def attributes(self, attempt: int) -> dict[str, Any]:
        """The user attributes with which an attempt is enqueued, in the order in which they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(PlannedTrial)} | {"attempt": attempt}


def plan_trials(study: Study) -> list[PlannedTrial]:
    """All runs: every run of a seed before the next seed, in it the big ones first, so that none is left for the end.

    Under sampler tpe the points are not known before runs have finished: ``hps`` is empty, one run a point, the
    seeds in turn.
    """
    spec = study.spec
    if spec.sampler == "tpe":
        assert spec.trials is not None  # held by the spec
        (cell,) = study.cells
        seeds = itertools.islice(itertools.cycle(spec.seeds), spec.trials)
        return [_planned(number, cell, {}, seed, f"tpe {number} seed {seed}") for number, seed in enumerate(seeds)]
    cells = sorted(study.cells, key=lambda cell: -(cell.scale or 0))  # stable: variants stay in their order
    by_scale = [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.scale)]
    runs = itertools.product(spec.seeds, by_scale, _planned_points(study))
    order = ((cell, hps, seed) for seed, cells, hps in runs for cell in cells)
    return [_planned(number, *run) for number, run in enumerate(order)]


def _planned_points(study: Study) -> list[HPValues]:
    """The points of the space that the study runs (grid, random and qmc), in the sampler's order."""
    spec, space = study.spec, study.space
    if spec.sampler == "grid":
        return space.grid()
    assert spec.trials is not None  # held by the spec
    return (space.quasi_random if spec.sampler == "qmc" else space.random)(spec.trials, spec.sampler_seed)


def _planned(number: int, cell: Cell, hps: HPValues, seed: int, key: str = "") -> PlannedTrial:
    """A trial; its key, unless given, is what makes it the same run as another, as one line of JSON."""
    run: dict[str, Any] = {"variant": cell.variant, "scale": cell.scale, "hps": hps, "seed": seed}
    key = key or json.dumps(run, sort_keys=True, separators=(",", ":"))
    return PlannedTrial(number=number, key=key, **run)
