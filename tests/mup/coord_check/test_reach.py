"""What is rounding beside a module's own later sizes is not reached yet; faults beside it are still found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from torch import nn

from helpers.models.tiny_dit import tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mup_mmdit
from helpers.mup_checks import coordinate_verdict
from helpers.rounding import reversed_sums
from megadit.config import ModelConfig, ObjectiveConfig, OptimConfig
from megadit.diffusion import build_objective
from megadit.models import build_model
from megadit.mup.coord_check.measure import measure_coordinates
from megadit.mup.coord_check.plan import CoordPlan, at_width
from megadit.mup.coord_check.record import CoordMeasurement
from megadit.mup.coord_check.report import format_verdict
from megadit.mup.coord_check.verdict import CoordVerdict, judge, reached_sizes

_WIDTHS = (32, 64, 128)
ROUNDING = (0.0, 0.0, 1.9e-7)  # read of MMDiT's joint_blocks.0.context_block.attn.proj on an AVX-512 machine
REAL = (0.031, 0.034, 0.036)
QUANTITIES = ("update.weight", "update.bias", "change", "activation", "pull")


def _verdict(*steps: Sequence[float], quantity: str = "update.weight", seeds: int = 1) -> CoordVerdict:
    """The verdict on one layer, and on another one that is right; ``steps``: sizes at the three widths, by step."""
    measurements = [
        CoordMeasurement(width, seed, step, module, "hidden", quantity, size)
        for module, rows in (("layer", steps), ("right", [REAL] * len(steps)))
        for step, sizes in enumerate(rows, 1)
        for width, size in zip(_WIDTHS, sizes, strict=True)
        for seed in range(seeds)
    ]
    return judge(measurements)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_rounding_at_the_first_steps_is_not_reached_yet(quantity: str, order: tuple[int, int, int]) -> None:
    first = [ROUNDING[i] for i in order]
    verdict = _verdict(first, REAL, REAL, REAL, REAL, quantity=quantity)
    assert verdict.passed and verdict.unreached == []
    slopes = verdict.modules[0].slopes[quantity]
    assert slopes[0] is None and all(slope is not None and abs(slope) < 0.2 for slope in slopes[1:])


def test_rounding_may_last_and_need_not_be_zero_anywhere() -> None:
    noise = (3e-7, 2e-8, 1e-8)  # a slope of -2.5
    assert _verdict(noise, ROUNDING, noise, REAL, REAL).passed
    assert _verdict(*[ROUNDING] * 8, REAL, REAL).passed  # longer than the steps that are looked ahead
    assert _verdict((2e-11, 0.0, 3e-12), (8e-4, 8e-4, 8e-4), (9e-4, 9e-4, 9e-4)).passed  # at a small rate


def test_seeds_and_widths_that_rounding_lets_go_first_wait_for_the_others() -> None:
    """Adam makes a gradient of rounding alone as large as any: a true zero moves at one width and not at another."""
    verdict = _verdict((0.0, 0.02, 0.0), REAL, REAL, REAL)
    assert verdict.passed and verdict.modules[0].slopes["update.weight"][0] is None


def test_steps_that_grow_are_all_judged() -> None:
    """What moves by the product of three rates has grown by 5^3 at the fifth step, by a million at the hundredth."""
    steps = [tuple(1e-7 * step**3 for _ in _WIDTHS) for step in range(1, 101)]
    slopes = _verdict(*steps).modules[0].slopes["update.weight"]
    assert len(slopes) == 100 and None not in slopes


SLOW = (0.03, 0.015, 0.0075)
DEAD = (0.03, 0.0, 0.03)


@pytest.mark.parametrize(
    "steps",
    [
        (ROUNDING, SLOW, SLOW, SLOW),
        (ROUNDING, (0.03, 0.03, 3e-4), (0.04, 0.04, 4e-4), (0.04, 0.04, 4e-4)),
        (ROUNDING, (0.03, 0.03, 1e-6), (0.04, 0.04, 1e-6), (0.04, 0.04, 2e-6)),
        (DEAD, DEAD, DEAD, DEAD),
        (ROUNDING, DEAD, DEAD, DEAD),
        (ROUNDING, (0.03, 1e-7, 0.03), (0.03, 0.0, 0.03), (0.03, 2e-7, 0.03)),
        (REAL, DEAD, DEAD, DEAD),
    ],
    ids=["slow", "one-width-slow", "one-width-almost-dead", "dead", "dead-later", "dead-but-rounding", "dies"],
)
def test_true_faults_beside_rounding_are_found(steps: Sequence[Sequence[float]]) -> None:
    verdict = _verdict(*steps)
    assert verdict.broken == ["layer"] and verdict.outcome == "broken"
    assert "weight learns too slowly" in verdict.modules[0].reasons[0]


def test_growth_after_rounding_is_found() -> None:
    verdict = _verdict(ROUNDING, (0.01, 0.02, 0.04), (0.01, 0.02, 0.04))
    assert "weight learns too fast" in verdict.modules[0].reasons[0]
    assert "not finite" in _verdict(ROUNDING, REAL, (0.03, 0.03, math.nan)).modules[0].reasons[0]


def test_one_dead_seed_is_a_dead_width() -> None:
    sizes = {(width, seed): [0.0, 0.03, 0.03] for width in _WIDTHS for seed in range(2)}
    assert reached_sizes(sizes)[1] == tuple((width, 0.03) for width in _WIDTHS)
    sizes[64, 1] = [0.0, 0.0, 1e-8]
    assert reached_sizes(sizes)[1:] == [((32, 0.03), (64, 0.0), (128, 0.03))] * 2


@pytest.mark.parametrize("sizes", [(0.0, 0.0, 0.0), ROUNDING])
def test_what_is_never_reached_is_named_and_does_not_fail(sizes: Sequence[float]) -> None:
    verdict = _verdict(sizes, sizes, sizes, sizes)
    assert verdict.passed and verdict.unreached == ["layer"] and verdict.modules[0].verdict == "unreached"
    assert verdict.to_json()["unreached"] == ["layer"]
    assert verdict.to_json()["modules"][0]["unreached"] == ["update.weight"]
    assert "layer is not judged: training does not reach it within the steps (update of weight)" in format_verdict(
        verdict
    )


def test_nothing_reached_is_no_pass() -> None:
    measurements = [
        CoordMeasurement(w, 0, s, "layer", "hidden", "update.weight", 0.0) for s in range(1, 6) for w in _WIDTHS
    ]
    verdict = judge(measurements)
    assert not verdict.passed and verdict.to_json()["verdict"] == "not judged"


def test_a_gradient_of_rounding_alone_moves_nothing() -> None:
    """Scores lose what all keys share, so that a key bias has no gradient but rounding: Adam must not follow it."""
    model = tiny_mup_dit(64, 64, depth=1)
    plan = CoordPlan(_WIDTHS, steps=5, seeds=1, batch=4)
    trained: list[nn.Module] = []

    def build(config: ModelConfig, seed: int) -> nn.Module:
        trained.append(build_model(config, seed=seed))
        return trained[-1]

    objective = build_objective(ObjectiveConfig(kind="ddpm"), learn_sigma=True)
    measure_coordinates(model, OptimConfig(lr=2.0**-9), plan, build=build, objective=objective)
    for one in trained:
        query, key, value = one.blocks[0].attn.qkv.bias.chunk(3)  # type: ignore[union-attr, index]
        assert not key.any() and query.all() and value.all()


def test_the_check_computes_in_float64_whatever_the_config_asks_of_norms() -> None:
    """fp32 attention and norms, as in the paper's PixArt, would bring float32's rounding back."""
    model = tiny_mup_dit(64, 64, attention_precision="fp32", norm_precision="fp32")
    config = at_width(model, 128, "mup", _WIDTHS)
    assert (config.attention_precision, config.norm_precision) == ("auto", "auto")


def test_another_library_gives_the_same_sizes() -> None:
    """Sums in reverse order, as other kernels would add, move no size of the check by more than 1e-6 of itself."""
    model = tiny_mup_mmdit(64, 64, depth=1, mlp="swiglu", pooled=12, init="original")
    plain = coordinate_verdict(model, batch=4)
    with reversed_sums():
        reverse = coordinate_verdict(model, batch=4)
    for one, other in zip(plain.modules, reverse.modules, strict=True):
        assert one.verdict == other.verdict and one.slopes.keys() == other.slopes.keys()
        for quantity, slopes in one.slopes.items():
            for a, b in zip(slopes, other.slopes[quantity], strict=True):
                assert a == b or (a is not None and b is not None and b == pytest.approx(a, abs=1e-5)), (
                    one.module,
                    quantity,
                )
