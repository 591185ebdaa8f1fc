"""Verdicts on surfaces whose answer is known: yes, no, and inconclusive wherever the data cannot tell."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from helpers.studies.loss_surfaces import surface
from megadit.transfer.verdict import Limits, RunScore, TransferVerdict, judge, worst


def samples(rows: dict[float, list[float]], first: float = -11.0) -> list[RunScore]:
    """One seed per cell, on a grid of whole octaves from ``first``."""
    return [RunScore(float(w), first + i, 0, score) for w, scores in rows.items() for i, score in enumerate(scores)]


def rates(drift: float, count: int = 20, **keys: object) -> Counter[str]:
    """How often each answer is given over ``count`` random surfaces."""
    verdicts = (judge(surface(drift, best=-6.2 + 0.07 * i, rng=i, **keys)).verdict for i in range(count))  # type: ignore[arg-type]
    return Counter(verdicts)


def test_no_drift_transfers():
    verdict = judge(surface(seeds=2, noise=0.003))
    assert verdict.verdict == "transfers" and verdict.best == 2.0**-7 and verdict.best_log2 == -7.0
    assert abs(verdict.drift) < 0.1 and verdict.drift_interval[0] < 0 < verdict.drift_interval[1]
    assert verdict.regret_relative < 0.01
    assert verdict.wider_is_better is True


@pytest.mark.parametrize("drift", [-1.0, -0.75, -0.5, 0.5])
def test_drift_is_recovered_and_does_not_transfer(drift):
    best = -5.2 if drift < 0 else -9.5
    verdict = judge(surface(drift, best=best, seeds=2, noise=0.003))
    assert verdict.verdict == "does not transfer"
    assert verdict.drift == pytest.approx(drift, abs=0.12)
    assert verdict.drift_interval[0] < drift < verdict.drift_interval[1]


def test_drift_without_much_regret_is_still_a_no():
    """A shallow basin hides the cost at these widths, but not that the optimum moves."""
    verdict = judge(surface(-0.6, best=-5.5, curvature=0.002, seeds=2, noise=0.0005), limits=Limits(max_regret=0.05))
    assert verdict.verdict == "does not transfer" and any("drifts" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    "keys",
    [
        {"seeds": 2, "noise": 0.005},
        {"seeds": 1, "noise": 0.005, "steep": 0.5},
        {"seeds": 4, "noise": 0.01, "edge": 1.4},
        {"seeds": 2, "noise": 0.005, "scales": (144, 288, 576), "steep": 0.5, "edge": 1.6},
    ],
    ids=["two seeds", "one seed, steep above", "four seeds, edge", "three widths, edge"],
)
def test_false_verdicts_are_rare(keys):
    assert rates(0.0, **keys)["transfers"] >= 18
    assert rates(-0.75, **keys)["does not transfer"] >= 18
    assert rates(-0.75, **keys)["transfers"] == 0


def test_the_measured_pattern_of_sp_and_mup():
    """A mini DiT at widths 32 to 256: optima of log2 lr -7, -7, -8, -9 under SP, and -7, -7, -8, -7 under muP."""
    nan = math.nan
    sp = judge(samples({
        32: [0.80, 0.72, 0.66, 0.625, 0.60, 0.63, 0.90],
        64: [0.78, 0.69, 0.63, 0.60, 0.585, 0.66, nan],
        128: [0.76, 0.67, 0.61, 0.575, 0.64, 1.20, nan],
        256: [0.74, 0.64, 0.565, 0.70, 1.465, nan, nan],
    }))  # fmt: skip
    assert sp.verdict == "does not transfer"
    assert sp.regret == pytest.approx(0.90) and sp.drift < -0.5
    mup = judge(samples({
        32: [0.80, 0.72, 0.66, 0.625, 0.605, 0.63, 0.80],
        64: [0.78, 0.69, 0.63, 0.602, 0.590, 0.61, 0.76],
        128: [0.76, 0.67, 0.61, 0.574, 0.577, 0.60, 0.73],
        256: [0.74, 0.65, 0.59, 0.565, 0.555, 0.58, 0.70],
    }))  # fmt: skip
    assert mup.verdict == "transfers" and mup.best == 2.0**-7 and abs(mup.drift) < 0.25


def test_divergence_at_the_proxys_best_is_infinite_regret():
    nan = math.nan
    verdict = judge(samples({32: [0.8, 0.7, 0.6, 0.65], 64: [0.75, 0.6, nan, nan], 128: [0.7, 0.58, nan, nan]}))
    assert verdict.verdict == "does not transfer" and verdict.regret == math.inf
    assert any("diverges" in reason for reason in verdict.reasons)
    plain = verdict.to_json()
    assert plain["regret"] is None and plain["per_scale"][1]["proxy_best_diverges"] is True
    json.dumps(plain, allow_nan=False)


def test_everything_diverged_at_a_scale():
    nan = math.nan
    verdict = judge(samples({32: [0.8, 0.7, 0.6, 0.65], 64: [nan] * 4}))
    assert verdict.verdict == "does not transfer"
    nothing = judge(samples({32: [nan] * 4, 64: [nan] * 4}))
    assert nothing.verdict == "inconclusive" and nothing.best is None
    json.dumps(nothing.to_json(), allow_nan=False)


def test_a_measured_edge_transfers_and_an_open_end_does_not():
    rising = [0.8, 0.7, 0.63, 0.60]
    edge = judge(samples({w: [*rising, math.nan] for w in (32, 64, 128)}))
    assert edge.verdict == "transfers" and edge.best_log2 == -8.0
    end = judge(samples({w: rising for w in (32, 64, 128)}))
    assert end.verdict == "inconclusive"
    assert any("highest that was tried; measure above it" in reason for reason in end.reasons)


INCONCLUSIVE = {
    "one scale": surface(scales=(64,)),
    "two stable points": samples({w: [0.7, 0.6, math.nan] for w in (32, 64, 128)}),
    "noise alone": surface(curvature=0.0, noise=0.02, seeds=2),
    "noise alone, one seed": surface(curvature=0.0, noise=0.02),
    "much noise": surface(-0.4, curvature=0.002, noise=0.05, seeds=2, grid=(-9, -8, -7, -6)),
    "the proxy's best unmeasured": [
        s for s in surface(best=-7.0, seeds=2, noise=0.001) if s.scale == 32 or s.hp < -7.5
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", INCONCLUSIVE)
def test_inconclusive_where_the_data_cannot_tell(name):
    verdict = judge(INCONCLUSIVE[name])
    assert verdict.verdict == "inconclusive", verdict.reasons
    assert verdict.reasons


def test_pure_noise_hardly_ever_gets_an_answer():
    assert rates(0.0, 30, curvature=0.0, noise=0.02, seeds=2)["inconclusive"] >= 29


def test_a_small_scale_may_be_an_exception():
    """The optimum of the smallest width alone lies elsewhere: it transfers from the next one on."""
    rows = [s for s in surface(best=-7.1, seeds=2, noise=0.002) if s.scale > 32]
    rows += [s for s in surface(best=-5.4, seeds=2, noise=0.002) if s.scale == 32]
    verdict = judge(rows)
    assert verdict.verdict == "transfers" and verdict.exceptions == (32.0,) and verdict.proxy == 64.0
    assert verdict.reasons[0] == "transfers from scale 64 on; exception: scale 32"
    assert [entry.exception for entry in verdict.scales] == [True, False, False, False]
    named = judge(rows, proxy=32.0)
    assert named.verdict == "does not transfer" and not named.exceptions  # a proxy that was asked for stays


def test_a_flat_basin_transfers_wherever_its_optimum_is():
    """Walls on both sides and noise between them, as for the paper's output multipliers."""
    rows = [
        RunScore(s.scale, s.hp, s.seed, s.score + (1.0 if s.hp in (-11, -10, -5, -4) else 0.0))
        for s in surface(curvature=0.0, noise=0.02, rng=3)
    ]
    verdict = judge(rows)
    assert verdict.verdict == "transfers"
    assert -9 <= verdict.best_log2 <= -6


def test_a_coarse_grid_is_no_reason_for_a_no():
    """The proxy's optimum lies half-way between two values, and half a percent of a tie sends it to the other one."""
    rows = surface(best=-7.5, drift=0.05, curvature=0.04)
    assert judge(rows).verdict != "does not transfer"


def test_wider_is_not_better_is_told_where():
    rows = samples({32: [0.7, 0.62, 0.6, 0.63, 0.7], 64: [0.68, 0.6, 0.58, 0.61, 0.9]})
    verdict = judge(rows)
    assert verdict.wider_is_better is False and verdict.not_better == ((-7.0, 32.0, 64.0),)


def test_higher_is_better_is_the_mirror_image():
    rows = surface(-0.6, best=-5.5, seeds=2, noise=0.003)
    mirrored = judge([RunScore(s.scale, s.hp, s.seed, -s.score) for s in rows], lower_is_better=False)
    ours = judge(rows)
    assert mirrored.verdict == ours.verdict and mirrored.drift == ours.drift and mirrored.regret == ours.regret
    assert mirrored.to_json()["per_scale"][0]["best_score"] == -ours.to_json()["per_scale"][0]["best_score"]


def test_limits_decide():
    rows = surface(-0.35, best=-6.0, seeds=2, noise=0.002)
    assert judge(rows).verdict == "does not transfer"
    assert judge(rows, limits=Limits(max_drift=0.6, max_regret=0.2)).verdict == "transfers"


def test_json_has_what_scripts_read():
    plain = judge(surface(seeds=2, noise=0.003), labels={"scale": "width", "hp": "lr"}).to_json()
    assert {"verdict", "best", "drift", "drift_interval", "regret", "per_scale", "proxy", "reasons"} <= set(plain)
    assert plain["proxy"] == 32 and plain["scale"] == "width"
    entry = plain["per_scale"][-1]
    assert entry["scale"] == 256 and entry["status"] == "agrees" and len(entry["points"]) == 8
    json.dumps(plain, allow_nan=False)


def test_the_worst_of_several():
    yes: TransferVerdict = judge(surface(seeds=2, noise=0.003))
    no: TransferVerdict = judge(surface(-0.75, best=-5.2, seeds=2, noise=0.003))
    unsure: TransferVerdict = judge(surface(scales=(64,)))
    assert worst([yes]) == "transfers"
    assert worst([yes, unsure]) == "inconclusive"
    assert worst([no, unsure, yes]) == "does not transfer"
