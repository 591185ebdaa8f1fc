"""Loss surfaces over log2 of a hyperparameter with a known optimum and drift, as samples for transfer verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megadit.transfer.estimate import RunScore

WIDTHS = (32, 64, 128, 256)
GRID = tuple(range(-11, -3))


def surface(
    drift: float = 0.0,
    *,
    best: float = -7.3,
    scales: Sequence[float] = WIDTHS,
    grid: Sequence[float] = GRID,
    curvature: float = 0.03,
    steep: float = 0.0,
    noise: float = 0.0,
    seeds: int = 1,
    edge: float = math.inf,
    rng: int = 0,
) -> list[RunScore]:
    """Losses around .6 that fall with scale; the optimum is ``best`` at the first scale and moves by ``drift``
    octaves per octave. ``steep``: how much steeper the upper side is an octave away; above ``edge`` octaves from the
    optimum runs diverge."""
    draw = np.random.default_rng(rng)
    samples = []
    for scale in scales:
        octaves = math.log2(scale / scales[0])
        for hp in grid:
            away = hp - best - drift * octaves
            wall = 1 + steep * max(away, 0.0)
            for seed in range(seeds):
                loss = 0.6 - 0.02 * octaves + curvature * away**2 * wall + noise * draw.standard_normal()
                samples.append(RunScore(float(scale), float(hp), seed, math.nan if away > edge else float(loss)))
    return samples
