"""What does not transfer by itself: each difference planted and found, and silence where there is none."""

from __future__ import annotations

import pytest

from megadit.config import load_config, replace
from megadit.nested import flatten
from megadit.search.apply.untransferred import VerifiedRange, untransferred

QUICK = "quickstart/digits.yaml"
WIDTH = VerifiedRange("model.width", 32, 256, "widths")


@pytest.fixture(scope="module")
def proxy():
    changes = ["train.steps=200", "optim.warmup_steps=20", "optim.weight_decay=.1", "optim.lr=2^-7"]
    return load_config(QUICK, changes)


def caveats(proxy, changes, verified=(WIDTH,), steps=None):
    target = replace(proxy, changes)
    lengths = proxy.train.steps, target.train.steps if steps is None else steps
    return {caveat.topic: caveat for caveat in untransferred(proxy, target, lengths, verified)}


def test_nothing_is_said_where_only_the_verified_differs(proxy):
    silent = {
        "model.width": 256,
        "train.seed": 7,
        "train.log_every": 3,
        "train.micro_batch": 4,
        "sample.count": 3,
        "data.workers": 2,
    }
    assert caveats(proxy, silent) == {}


def test_width_beyond_the_verified_span_is_extrapolation(proxy):
    differences = caveats(proxy, {"model.width": 512})
    assert differences["width"].text == (
        "width: 64 at the proxy, 512 at the target; transfer was verified from 32 to 256 (widths), "
        "and beyond is extrapolation"
    )
    assert "no study given verified transfer over width" in caveats(proxy, {"model.width": 512}, ())["width"].text


def test_longer_training(proxy):
    differences = caveats(proxy, {"train.steps": 2000})
    assert set(differences) == {"horizon", "weight_decay", "warmup"}
    assert "200 steps (6,400 images) at the proxy, 2,000 steps (64,000 images)" in differences["horizon"].text
    decay = differences["weight_decay"]
    assert decay.proxy == pytest.approx(2**-7 * 0.1 * 200) and decay.target == pytest.approx(10 * decay.proxy)
    assert "optim.weight_decay=0.01 keeps it" in decay.text
    assert "20 of 200 steps (10%) at the proxy, 20 of 2,000 (1%)" in differences["warmup"].text
    assert "optim.warmup_steps=200 keeps the share" in differences["warmup"].text
    with_schedule = caveats(proxy, {"train.steps": 2000, "optim.weight_decay": 0.01, "optim.warmup_steps": 200})
    assert set(with_schedule) == {"horizon", "optim.weight_decay"}
    inside = VerifiedRange("train.steps", 100, 4000, "steps")
    assert "horizon" not in caveats(proxy, {"train.steps": 2000}, (inside,))
    beyond = caveats(proxy, {"train.steps": 8000}, (inside,))["horizon"]
    assert "verified from 100 to 4000 (steps), and beyond" in beyond.text


def test_shares_keep_themselves(proxy):
    share = replace(proxy, {"optim.warmup_steps": "10%"})
    assert set(caveats(share, {"train.steps": 2003, "optim.weight_decay": 0.01})) == {"horizon", "optim.weight_decay"}
    differences = caveats(proxy, {"train.steps": 2000, "optim.weight_decay": 0.01, "optim.warmup_steps": "5%"})
    assert "20 of 200 steps (10%) at the proxy, 100 of 2,000 (5%) at the target" in differences["warmup"].text


def test_a_warm_up_beyond_the_proxys_run_is_not_suggested_to_the_target(proxy):
    longer = replace(proxy, {"optim.warmup_steps": 500})
    text = caveats(longer, {"train.steps": 100, "optim.weight_decay": 0.2})["warmup"].text
    assert text == (
        "warm-up: 500 of 200 steps (250%) at the proxy, 500 of 100 (500%) at the target; the proxy's rate ended before "
        "it, at 40% of optim.lr: choose a warm-up anew"
    )


def test_batch_beyond_what_was_verified(proxy):
    assert (
        "no study given verified transfer over batch sizes" in caveats(proxy, {"train.global_batch": 64})["batch"].text
    )
    span = VerifiedRange("train.global_batch", 32, 64, "batches")
    assert caveats(proxy, {"train.global_batch": 64}, (span,)) == {}
    assert "verified from 32 to 64 (batches)" in caveats(proxy, {"train.global_batch": 128}, (span,))["batch"].text


def test_shape_of_the_model(proxy):
    differences = caveats(
        proxy, {"model.depth": 28, "model.head_dim": 32, "model.input_size": 16, "data.image_size": 16}
    )
    assert {"depth", "head_dim", "resolution"} <= set(differences)
    assert "4 blocks at the proxy, 28" in differences["depth"].text
    assert "model.head_dim=16 keeps it" in differences["head_dim"].text
    assert "8 x 8, 16 tokens at the proxy, 16 x 16, 64 at the target" in differences["resolution"].text


def test_weight_decay_rules_that_change_with_width(proxy):
    base = replace(proxy, {"optim.wd_mode": "constant"})
    (caveat,) = caveats(base, {"model.width": 256}).values()
    assert caveat.proxy == pytest.approx(2**-7 * 0.1) and caveat.target == pytest.approx(2**-7 * 0.1 / 4)
    assert "wd_mode independent keeps it equal" in caveat.text


def test_every_other_difference_is_named_with_both_values(proxy):
    differences = caveats(
        proxy,
        {
            "objective.time_sampling": "logit_normal",
            "train.precision": "bf16",
            "optim.betas": (0.9, 0.95),
            "optim.schedule": "cosine",
            "model.qk_norm": "rms",
            "data.flip": True,
        },
    )
    assert {caveat.text for caveat in differences.values()} == {
        "objective.time_sampling: uniform at the proxy, logit_normal at the target",
        "train.precision: fp32 at the proxy, bf16 at the target",
        "optim.betas: [0.9, 0.999] at the proxy, [0.9, 0.95] at the target",
        "optim.schedule: constant at the proxy, cosine at the target",
        "model.qk_norm: none at the proxy, rms at the target",
        "data.flip: false at the proxy, true at the target",
    }


def test_a_section_that_only_one_has_is_told_by_its_values(proxy):
    other = {"data.vae.scale": 0.5, "model.input_size": 8, "data.image_size": 64}
    differences = caveats(proxy, other)
    assert differences["data.vae.scale"].text == "data.vae.scale: null at the proxy, 0.5 at the target"
    assert "data.vae" not in differences


def test_length_that_is_not_known(proxy):
    target = replace(proxy, {"train.epochs": 5})
    (caveat,) = untransferred(proxy, target, (200, None), (WIDTH,))
    assert caveat.topic == "horizon" and "5 epochs at the target" in caveat.text


def test_flat():
    assert flatten({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "a.c": {}, "d": None}
