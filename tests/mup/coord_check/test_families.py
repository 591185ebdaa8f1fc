"""The coordinate check of every family, with REPA: muP passes, and a fault planted in one layer is caught there.

One fault per family is quick to look for at every change; the others are marked slow.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from torch import Tensor

from helpers.models.tiny_dit import tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mup_mmdit
from helpers.models.tiny_pixart import tiny_mup_pixart
from helpers.models.tiny_uvit import tiny_mup_uvit
from helpers.mup_checks import Fault, coordinate_verdict, plant_spec
from megadit.config import ModelConfig, ObjectiveConfig, OptimConfig
from megadit.diffusion import build_objective
from megadit.diffusion.objectives.repa import alignment_loss
from megadit.models import StagedModel, build_model
from megadit.mup import ParamSpec
from megadit.mup.coord_check.measure import Build, measure_coordinates
from megadit.mup.coord_check.plan import CoordPlan
from megadit.mup.coord_check.verdict import CoordVerdict, ModuleVerdict

_BASE = 64
_WIDTHS = (32, 64, 128)


def _repa(block: int, norm: str = "none") -> dict[str, Any]:
    return {"block": block, "feature_dim": 24, "hidden": 64, "norm": norm}


def _family(name: str, **changes: Any) -> ModelConfig:
    """A tiny muP model of a family, with everything that it can have and REPA in the middle."""
    if name == "dit":
        return tiny_mup_dit(64, _BASE, **{"repa": _repa(1), **changes})
    if name == "pixart":
        return tiny_mup_pixart(64, _BASE, **{"repa": _repa(1), **changes})
    if name == "uvit":
        options = {"depth": 2, "qk_norm": "rms", "mlp_time_embed": True, "repa": _repa(2)}
        return tiny_mup_uvit(64, _BASE, "text", **{**options, **changes})
    options = {"depth": 2, "pooled": 12, "mlp": "swiglu", "qk_norm": "rms", "repa": _repa(1)}
    return tiny_mup_mmdit(64, _BASE, **{**options, **changes})


FAMILIES = ("dit", "pixart", "uvit", "mmdit")


def _built(config: ModelConfig, seed: int) -> StagedModel:
    return build_model(config, seed=seed)


def _aligned(projected: Tensor, target: Tensor) -> Tensor:
    return 0.5 * alignment_loss(projected, target)


def _check(model: ModelConfig, build: Build = _built, parametrization: str = "mup") -> CoordVerdict:
    alignment = None if model.repa is None else _aligned
    return coordinate_verdict(model, parametrization, _WIDTHS, batch=12, build=build, alignment=alignment)


def _wrong(verdict: CoordVerdict) -> dict[str, list[str]]:
    return {module.module: module.reasons or module.effects for module in verdict.modules if module.verdict != "ok"}


def _module(verdict: CoordVerdict, name: str) -> ModuleVerdict:
    return next(module for module in verdict.modules if module.module == name)


@pytest.mark.parametrize("family", FAMILIES)
def test_mup_passes(family: str) -> None:
    verdict = _check(_family(family))
    assert verdict.passed, _wrong(verdict)
    assert abs(_module(verdict, "repa").growth("pull") or 1.0) < 0.2
    # The last text stream's queries lead nowhere, as in Stable Diffusion 3: named, neither right nor wrong.
    assert verdict.unreached == (["joint_blocks.1.context_block.attn.ln_q"] if family == "mmdit" else [])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sp_fails(family: str) -> None:
    verdict = _check(_family(family), parametrization="sp")
    hidden = {
        m.module for m in verdict.modules if m.role in ("hidden", "output") and m.module not in ("output", "repa")
    }
    broken = hidden & set(verdict.broken)
    assert not verdict.passed and len(broken) >= 0.75 * len(hidden), hidden - broken
    assert "too fast" in _module(verdict, "repa.fc1").reasons[0]


@pytest.mark.slow
def test_the_norm_of_the_projector_passes_too() -> None:
    verdict = _check(_family("dit", repa=_repa(1, "rms")))
    assert verdict.passed, _wrong(verdict)


def lr_of_sp(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, lr_mult=1.0)


def lr_of_hidden(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, lr_mult=1 / m)


def lr_times_m(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, lr_mult=m)


def no_multiplier(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, forward_mult=1.0)


def constant_std(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, init_std=spec.init_std * math.sqrt(m))


def std_of_fan_out(spec: ParamSpec, m: float) -> ParamSpec:
    """Xavier's: the fan-out of an input layer grows with width."""
    return dataclasses.replace(spec, init_std=math.sqrt(2 / (spec.fan_in + spec.fan_out)))


def as_hidden(spec: ParamSpec, m: float) -> ParamSpec:
    """REPA's first linear as if its other side grew too: no multiplier, rate and std of a hidden weight."""
    return dataclasses.replace(spec, forward_mult=1.0, lr_mult=1 / m, init_std=spec.fan_in**-0.5)


def ten_times(spec: ParamSpec, m: float) -> ParamSpec:
    return dataclasses.replace(spec, init_std=10 * spec.init_std)


# (family, parameter, fault, what is said of its layer)
QUICK: list[tuple[str, str, Fault, str]] = [
    ("dit", "repa.fc1.weight", no_multiplier, "too fast"),
    ("pixart", "blocks.1.cross_attn.kv_linear.weight", lr_of_sp, "too fast"),
    ("uvit", "out_blocks.0.skip_linear.weight", constant_std, "too large"),
    ("mmdit", "context_embedder.weight", lr_of_hidden, "too slowly"),
]
MORE: list[tuple[str, str, Fault, str]] = [
    ("dit", "blocks.0.mlp.fc1.weight", lr_of_sp, "too fast"),
    ("dit", "final_layer.linear.weight", no_multiplier, "too fast"),
    ("dit", "x_embedder.proj.weight", std_of_fan_out, "too small"),
    ("dit", "repa.fc2.weight", lr_of_hidden, "too slowly"),
    ("pixart", "blocks.0.scale_shift_table", lr_of_hidden, "too slowly"),
    ("pixart", "final_layer.scale_shift_table", lr_times_m, "too fast"),
    ("pixart", "t_block.1.weight", lr_of_sp, "too fast"),
    ("pixart", "y_embedder.y_proj.fc1.weight", lr_of_hidden, "too slowly"),
    ("pixart", "y_embedder.y_proj.fc2.weight", constant_std, "too large"),
    ("pixart", "blocks.0.cross_attn.q_linear.weight", lr_of_sp, "too fast"),
    ("pixart", "final_layer.linear.weight", no_multiplier, "too fast"),
    ("uvit", "out_blocks.0.skip_linear.weight", lr_of_sp, "too fast"),
    ("uvit", "pos_embed.weight", lr_of_hidden, "too slowly"),
    ("uvit", "context_embed.weight", std_of_fan_out, "too small"),
    ("uvit", "time_embed.2.weight", lr_of_sp, "too fast"),
    ("uvit", "decoder_pred.weight", no_multiplier, "too fast"),
    ("uvit", "mid_block.norm1.weight", lr_of_hidden, "too slowly"),
    ("mmdit", "joint_blocks.0.context_block.attn.qkv.weight", lr_of_sp, "too fast"),
    ("mmdit", "joint_blocks.0.x_block.mlp.fc2.weight", constant_std, "too large"),
    ("mmdit", "joint_blocks.0.context_block.adaLN_modulation.1.weight", lr_of_sp, "too fast"),
    ("mmdit", "y_embedder.mlp.0.weight", lr_of_hidden, "too slowly"),
    ("mmdit", "joint_blocks.0.x_block.attn.ln_q.weight", lr_of_hidden, "too slowly"),
    ("mmdit", "final_layer.linear.weight", no_multiplier, "too fast"),
]


def _ids(faults: list[tuple[str, str, Fault, str]]) -> list[str]:
    return [f"{family}-{parameter}-{fault.__name__}" for family, parameter, fault, _ in faults]


def _assert_caught(family: str, parameter: str, fault: Fault, words: str) -> None:
    verdict = _check(_family(family), plant_spec(parameter, fault))
    layer = parameter.rpartition(".")[0]
    assert layer in verdict.broken, _wrong(verdict)
    assert any(words in reason for reason in _module(verdict, layer).reasons)
    assert len(verdict.broken) <= 2, _wrong(verdict)


@pytest.mark.parametrize(("family", "parameter", "fault", "words"), QUICK, ids=_ids(QUICK))
def test_a_fault_is_caught_in_its_layer(family: str, parameter: str, fault: Fault, words: str) -> None:
    _assert_caught(family, parameter, fault, words)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "parameter", "fault", "words"), MORE, ids=_ids(MORE))
def test_every_fault_is_caught_in_its_layer(family: str, parameter: str, fault: Fault, words: str) -> None:
    _assert_caught(family, parameter, fault, words)


@pytest.mark.parametrize("fault", [as_hidden, ten_times], ids=lambda fault: fault.__name__)
def test_a_projection_that_starts_at_random_alone_pulls_too_hard(fault: Fault) -> None:
    """As hidden, or with random products that outweigh the bias: either way the gradient into block k grows."""
    verdict = _check(_family("dit"), plant_spec("repa.fc1.weight", fault))
    assert "repa" in verdict.broken and "pulls its block too hard" in _module(verdict, "repa").reasons[0]


def test_models_with_a_projector_need_an_alignment() -> None:
    with pytest.raises(ValueError, match="belongs to a model with a REPA projector"):
        measure_coordinates(
            _family("dit"),
            OptimConfig(),
            CoordPlan(_WIDTHS),
            build=_built,
            objective=build_objective(ObjectiveConfig(), learn_sigma=True),
        )
