"""The runs of a study: every point, cell and seed, in the order in which they are started."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadit.search.study.space import HPValues
from megadit.search.study.study import Cell, Study


@dataclass(frozen=True)
class PlannedTrial:
    """One training run. ``key`` says which, whatever else the study holds; ``number`` is its place in the plan.

    A plan that grows (more seeds, points or values) keeps the keys and moves the numbers.
    """

    number: int
    cell: Cell
    hps: Mapping[str, Any]
    seed: int
    key: str


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
        return [PlannedTrial(number, cell, {}, seed, f"tpe {number} seed {seed}") for number, seed in enumerate(seeds)]
    by_scale: dict[int | None, list[Cell]] = {}
    for cell in sorted(study.cells, key=lambda cell: -(cell.scale or 0)):  # stable: variants stay in their order
        by_scale.setdefault(cell.scale, []).append(cell)
    runs = itertools.product(spec.seeds, by_scale.values(), planned_points(study))
    order = [(cell, hps, seed) for seed, cells, hps in runs for cell in cells]
    return [PlannedTrial(number, *run, trial_key(*run)) for number, run in enumerate(order)]


def planned_points(study: Study) -> list[HPValues]:
    """The points of the space that the study runs (grid, random and qmc), in the sampler's order."""
    spec, space = study.spec, study.space
    if spec.sampler == "grid":
        return space.grid()
    assert spec.trials is not None  # held by the spec
    return (space.quasi_random if spec.sampler == "qmc" else space.random)(spec.trials, spec.sampler_seed)


def trial_key(cell: Cell, hps: Mapping[str, Any], seed: int) -> str:
    """What makes a run the same run: variant, scale, hyperparameters and seed, as one line of JSON."""
    identity = {"variant": cell.variant, "scale": cell.scale, "hps": dict(hps), "seed": seed}
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))
