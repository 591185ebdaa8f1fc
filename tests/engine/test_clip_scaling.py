"""The width scaling of the clipping thresholds against measured gradient norms.

muP DiTs of four widths are trained for a few steps on the same batches; the slope of log norm over log width must be
that of each role's ``clip_mult``: 0 for hidden and finite parameters, -1/2 for input, vector and output ones.
"""

import math
import statistics

import pytest
import torch

from helpers.training import plain_torch_run, small_config
from megadit.models import build_model
from megadit.mup.groups import clip_mults
from megadit.mup.spec import param_specs

WIDTHS = (32, 64, 128, 256)
SEEDS = (1, 2)
STEPS = 16
TOLERANCE = 0.15  # of a slope; the two possible values lie 0.5 apart


def config_of(width, seed=1):
    model = {"width": width, "heads": None, "head_dim": 16, "base_width": 32, "qk_norm": "rms"}
    optim = {"lr": 2e-3, "weight_decay": 0.0, "clip": {"value": None}, "warmup_steps": 0}
    return small_config(model=model, optim=optim, train={"seed": seed, "global_batch": 16})


def median_norms(width):
    """Median over steps and seeds; the zero readout hides the rest of the model from the first steps' gradients."""
    runs = [plain_torch_run(config_of(width, seed), STEPS)["role_norms"][STEPS // 2 :] for seed in SEEDS]
    return {role: statistics.median(norms[role] for run in runs for norms in run) for role in runs[0][0]}


def slope(values):
    x, y = [math.log(width) for width in WIDTHS], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def test_thresholds_scale_as_measured_norms_do():
    torch.set_num_threads(1)
    norms = [median_norms(width) for width in WIDTHS]
    mults = [clip_mults(param_specs(build_model(config_of(width).model, device="meta"))) for width in WIDTHS]
    assert norms[0].keys() == mults[0].keys() == {"input", "hidden", "vector", "output", "finite"}
    measured = {role: slope([norm[role] for norm in norms]) for role in norms[0]}
    expected = {role: slope([mult[role] for mult in mults]) for role in mults[0]}
    assert {round(value, 9) for value in expected.values()} == {0.0, -0.5}
    assert measured == pytest.approx(expected, abs=TOLERANCE)
