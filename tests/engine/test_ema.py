"""Moving averages of the weights against a float64 average over a plain torch loop, and what else must hold of them."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import assemble_rank, merge_weights, plain_torch_run, small_config, train_on, train_rank
from megadit.checkpoint.find import find_checkpoint, load_model
from megadit.config.schema.run import EmaConfig
from megadit.engine.ema import power_decay, power_exponent
from megadit.errors import UserError

STEPS = 8
EMA = {"decays": (0.5, 0.9999), "sigma_rels": (0.2,)}
NAMES = ("0.5", "0.9999", "sigma-0.2")
LAYOUTS = [(1, 0, 16), (1, 1, 4), (1, 2, 8), (1, 3, 16), (2, 0, 4), (2, 1, 8), (2, 2, 4), (2, 3, 4)]


def float64_average(path, decay):
    """Average of the weights in ``path`` (initial ones first), where update t keeps ``decay(t)`` of it."""
    average = {name: values.double() for name, values in path[0].items()}
    for t, weights in enumerate(path[1:], 1):
        for name, values in weights.items():
            average[name] = decay(t) * average[name] + (1 - decay(t)) * values.double()
    return average


def profile_average(path, gamma):
    """The power profile written out: the weights of time t count as the integral of s^gamma over [t - 1, t]."""
    share = [(t / (len(path) - 1)) ** (gamma + 1) for t in range(len(path))]
    return {
        name: sum((share[t] - share[t - 1]) * path[t][name].double() for t in range(1, len(path))) for name in path[0]
    }


def references(path):
    gamma = power_exponent(0.2)
    return {
        "0.5": float64_average(path, lambda t: 0.5),
        "0.9999": float64_average(path, lambda t: 0.9999),
        "sigma-0.2": profile_average(path, gamma),
    }


@pytest.fixture(scope="module")
def plain():
    torch.set_num_threads(1)
    return plain_torch_run(small_config(), STEPS)["path"]


def relative_gap(averages, expected):
    """Largest distance of a parameter, relative to its norm; key biases left out, whose gradient is rounding noise."""
    gaps = []
    for name, values in expected.items():
        difference = averages[name].double() - values
        if name.endswith("qkv.bias"):
            difference = torch.cat(difference.chunk(3)[::2])
        gaps.append(float(difference.norm() / values.norm().clamp_min(1e-6)))
    return max(gaps)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage", "micro"), LAYOUTS)
def test_averages_of_every_layout_equal_a_plain_float64_average(plain, tmp_path, world, stage, micro):
    config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": micro}, ema=EMA)
    results = run_ranks(world, train_rank, config, str(tmp_path), STEPS)
    for name, expected in references(plain).items():
        assert relative_gap(merge_weights(results, f"ema/{name}"), expected) <= 1e-5, name
    if stage > 0:  # no rank holds more than its share
        sizes = [sum(piece[4].numel() for piece in result["ema/0.5"]) for result in results]
        assert sum(sizes) == sum(values.numel() for values in plain[0].values())
        assert max(sizes) <= 1.1 * sum(sizes) / world


def own_path_rank(config, folder, ds):
    """Averages, and the masters after every step, of one rank."""
    run = assemble_rank(config, folder, None, ds)
    parts = run.engine.partitions
    path = [{f.name: f.values.clone() for f in parts.fragments()}]
    for step in range(STEPS):
        train_on(run, step + 1)
        path.append({f.name: f.values.clone() for f in parts.fragments()})
    averages = {
        name: {f.name: run.engine.ema.tensors(f)[f"ema/{name}"].clone() for f in parts.fragments()} for name in NAMES
    }
    return path, averages, run.position.skipped_steps


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "zero"),
    [
        ("bf16", {"stage": 2, "round_robin_gradients": True, "reduce_bucket_size": 500}),
        ("bf16", {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000}),
        ("fp32", {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_averages_are_of_the_masters_to_float32_rounding(tmp_path, precision, zero):
    config = small_config(train={"precision": precision, "micro_batch": 8}, ema=EMA)
    for path, averages, _ in run_ranks(2, own_path_rank, config, str(tmp_path), {"zero_optimization": zero}):
        for name, expected in references(path).items():
            for parameter, values in expected.items():
                torch.testing.assert_close(averages[name][parameter].double(), values, rtol=1e-6, atol=1e-7)


def fp16_rank(*args):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return own_path_rank(*args)


@pytest.mark.distributed
def test_skipped_updates_are_not_averaged(tmp_path):
    """fp16's overflows leave weights and averages alone, and do not count as time of the power profile."""
    ds = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}, "zero_optimization": {"stage": 2}}
    config = small_config(train={"precision": "fp16", "micro_batch": 8}, ema=EMA)
    for path, averages, skipped in run_ranks(2, fp16_rank, config, str(tmp_path), ds):
        applied = [path[0]]
        for weights in path[1:]:
            if any(not torch.equal(weights[name], applied[-1][name]) for name in weights):
                applied.append(weights)
        assert 0 < skipped == len(path) - len(applied)
        for name, expected in references(applied).items():
            for parameter, values in expected.items():
                torch.testing.assert_close(averages[name][parameter].double(), values, rtol=1e-6, atol=1e-7)


class OneBuffer:
    """Partitions of one buffer, for what needs no DeepSpeed."""

    def __init__(self, size=7):
        from megadit.engine.deepspeed.partitions import Fragment

        self.flat = torch.nn.Parameter(torch.zeros(size))
        self.published = []
        self._fragment = Fragment("w", (size,), 0, size, self.flat.data, self.flat, 0)

    def fragments(self):
        return [self._fragment]

    def publish_masters(self):
        self.published.append(self.flat.detach().clone())


@pytest.mark.parametrize("every", [1, 3])
def test_every_kth_update_carries_the_decay_of_k(every):
    from megadit.engine.ema import Ema

    parts = OneBuffer(1)
    ema = Ema(parts, EmaConfig(decays=(0.9,), sigma_rels=(0.1,), every=every))
    path = [0.0]
    for t in range(1, 13):
        parts.flat.data.fill_(math.sin(t))
        ema.update(t)
        # Between two updates the weights count as they are at the later one.
        path += [math.sin(t)] * every if t % every == 0 else []
    averages = {name: float(values) for name, values in ema.tensors(parts.fragments()[0]).items()}
    average = 0.0
    for value in path[1:]:
        average = 0.9 * average + 0.1 * value
    gamma = power_exponent(0.1)
    profile = sum(((t / 12) ** (gamma + 1) - ((t - 1) / 12) ** (gamma + 1)) * path[t] for t in range(1, 13))
    assert averages == {"ema/0.9": pytest.approx(average, abs=1e-6), "ema/sigma-0.1": pytest.approx(profile, abs=1e-6)}


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_power_exponent_is_that_of_the_relative_width(sigma):
    """By the definition, and as the standard deviation of the profile itself; two values are the paper's own."""
    exponent = power_exponent(sigma)
    assert round(exponent, 2) == {0.05: 16.97, 0.1: 6.94}.get(sigma, round(exponent, 2))
    assert math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))) == pytest.approx(sigma, rel=1e-9)
    time = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    share = time**exponent / (time**exponent).sum()
    mean = (share * time).sum()
    assert float((share * (time - mean) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=1e-3)


def test_power_decay_over_several_updates_is_the_product():
    assert power_decay(5.0, 40, 4) == pytest.approx(math.prod(power_decay(5.0, t) for t in (37, 38, 39, 40)))
    assert power_decay(5.0, 4, 4) == 0.0  # nothing is kept of the initial weights


def swap_rank(config, folder, ds):
    """Look through an average, with passes before, inside and after; what was seen and whether all came back."""
    from megadit.train.validation import validation_losses

    run = assemble_rank(config, folder, None, ds)
    engine, name = run.engine, "0.5"
    train_on(run, 3)

    def working():
        import deepspeed

        parameters = dict(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.partitions.stage == 3):
            return {key: p.detach().clone() for key, p in parameters.items()}

    def state():
        parts = engine.partitions
        values = [[f.values, *engine.ema.tensors(f).values(), *parts.moments(f).values()] for f in parts.fragments()]
        return working(), [t.clone() for fragment in values for t in fragment]

    def same(one, other):
        return all(map(torch.equal, one[0].values(), other[0].values())) and all(map(torch.equal, one[1], other[1]))

    before, online = state(), validation_losses(run)
    averaged = validation_losses(run, name)
    inside = []
    with engine.evaluation(name):
        inside.append(working())
        with pytest.raises(RuntimeError, match=r"while '0\.5' is in the place"):
            engine.ema.update(4)
        with pytest.raises(RuntimeError, match="exchanged once more"), engine.ema.swapped(name):
            pass
    intact = same(before, state())
    with pytest.raises(ZeroDivisionError), engine.evaluation(name):
        raise ZeroDivisionError
    again = validation_losses(run)  # settles what the exception left
    intact = intact and same(before, state()) and again == online
    expected = [
        (f.name, f.shape, f.start, f.stop, engine.ema.tensors(f)[f"ema/{name}"].clone(), f.shard_regions)
        for f in engine.partitions.fragments()
    ]
    with pytest.raises(ZeroDivisionError), engine.evaluation(name):
        raise ZeroDivisionError
    losses = [r["loss"] for r in train_on(run, 5)]
    return {"intact": intact, "inside": inside[0], "pieces": expected, "val": (online, averaged), "losses": losses}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "precision", "zero"),
    [
        (2, "fp32", {"stage": 0}),
        (2, "bf16", {"stage": 1}),
        (2, "bf16", {"stage": 3}),
        (2, "fp32", {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000}),
        (1, "bf16", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_an_average_takes_the_place_of_the_weights_and_leaves_no_trace(tmp_path, world, precision, zero):
    train = {"precision": precision, "micro_batch": 8, "validation_images": 20}
    config = small_config(train=train, ema={"decays": (0.5, 0.9)}, data={"val_fraction": 0.1})
    ds = {"zero_optimization": zero}
    results = run_ranks(world, swap_rank, config, str(tmp_path / "swapped"), ds)
    average = merge_weights(results)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for result in results:
        assert result["intact"]
        for name, values in result["inside"].items():
            assert torch.equal(values.flatten().to(dtype), average[name].to(dtype)), name
    online, averaged = (losses["loss"] for losses in results[0]["val"])
    assert abs(online - averaged) > 1e-4
    straight = run_ranks(world, train_rank, config, str(tmp_path / "straight"), 5, None, ds)
    assert results[0]["losses"] == straight[0]["losses"][3:]


def test_a_lone_failure_needs_no_other_rank():
    """Only the masters come back at once; gathering the working weights would wait for ranks that did not fail."""
    from megadit.engine.ema import Ema

    parts = OneBuffer()
    ema = Ema(parts, EmaConfig(decays=(0.5,)))
    parts.flat.data.fill_(2.0)
    with pytest.raises(ZeroDivisionError), ema.swapped("0.5"):
        assert float(parts.published[-1].sum()) == 0.0
        raise ZeroDivisionError
    assert len(parts.published) == 1 and torch.equal(parts.flat.detach(), torch.full((7,), 2.0))
    ema.publish_if_stale()
    ema.publish_if_stale()
    assert len(parts.published) == 2 and torch.equal(parts.published[-1], torch.full((7,), 2.0))
    with pytest.raises(KeyError, match=r"'0\.7'"), ema.swapped("0.7"):
        pass


def test_names_and_bad_values():
    assert EmaConfig(decays=(0.9999, 0.999), sigma_rels=(0.05, 0.1)).names == (
        "0.9999",
        "0.999",
        "sigma-0.05",
        "sigma-0.1",
    )
    assert small_config(ema=EMA, sample={"weights": 0.9999}).sample.weights == "0.9999"  # as YAML reads it
    for section, message in (
        ({"ema": {"decays": (1.0,)}}, "decays: 1.0 does not lie between 0 and 1"),
        ({"ema": {"sigma_rels": (0.3,)}}, "sigma_rels: 0.3 does not lie"),
        ({"ema": {"decays": (0.9, 0.9)}}, "names an average twice"),
        ({"sample": {"weights": "0.99"}}, r"sample\.weights: 0\.99 is none of online; choose one, or add"),
        (
            {"train": {"validate_with": ("online", "0.9")}, "ema": EMA},
            r"0\.9 is none of online, 0\.5, 0\.9999, sigma-0\.2",
        ),
        ({"train": {"validate_with": ("online", "online")}}, "names weights twice"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config(**section)


def test_the_plan_counts_averages():
    from megadit.plan.memory import state_bytes

    none, two = (state_bytes(1000, 4, 2, "bf16", averages) for averages in (0, 2))
    assert two == {**none, "averages": 2 * 4 * 1000 / 4}
    assert state_bytes(1000, 4, 0, "fp32", 1)["averages"] == 4000  # stage 0 shards nothing


def test_a_configuration_file_takes_averages(tmp_path):
    from megadit.config import load
    from megadit.config.loading.sources import configs_dir

    text = f"base: {configs_dir() / 'quickstart/digits.yaml'}\nema: {{decays: [0.999, 9.99e-1], every: 2}}\n"
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(UserError, match=r"ema\.decays.*twice"):
        load(tmp_path / "twice.yaml")
    overrides = ["ema.decays=[0.999,1e-1]", "sample.weights=0.999", "train.validate_with=[online,0.1]"]
    config = load("quickstart/digits.yaml", overrides).config
    assert config.ema.decays == (0.999, 0.1)
    assert (config.sample.weights, config.train.validate_with) == ("0.999", ("online", "0.1"))


CHAIN = [(2, 2, 2), (1, 0, 4), (2, 3, 6), (1, 1, 8)]  # ranks, ZeRO stage, trained to


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One training handed from layout to layout through checkpoints; its run directory and the last ranks' results."""
    from megadit.config import save_config

    folder, saved = tmp_path_factory.mktemp("chain"), None
    for world, stage, until in CHAIN:
        config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": 8}, ema=EMA)
        results = run_ranks(world, train_rank, config, str(folder), until, saved)
        saved = results[0]["saved"]
    save_config(config, folder / "config.yaml")
    return folder, config, results


@pytest.mark.distributed
def test_averages_go_from_layout_to_layout(plain, chain):
    folder, _, results = chain
    for name, expected in references(plain).items():
        average = merge_weights(results, f"ema/{name}")
        assert relative_gap(average, expected) <= 1e-5, name
        model = load_model(folder, weights=name)[1]
        assert all(torch.equal(p.flatten(), average[key]) for key, p in model.named_parameters())


@pytest.mark.distributed
def test_averages_that_are_new_or_gone_are_told(chain, tmp_path):
    folder, config, results = chain
    changed = config.model_copy(update={"ema": EmaConfig(decays=(0.5, 0.9))})
    (resumed,) = run_ranks(1, resumed_rank, changed, str(tmp_path), str(find_checkpoint(folder)))
    weights, average = merge_weights(results), merge_weights(results, "ema/0.5")
    for name, values in weights.items():
        assert torch.equal(resumed["tensors"][name]["ema/0.9"], values)
        assert torch.equal(resumed["tensors"][name]["ema/0.5"], average[name])
    assert "note: ema/0.9 is not in the checkpoint and starts from its weights" in resumed["stderr"]
    for name in ("0.9999", "sigma-0.2"):
        assert f"note: ema/{name} of the checkpoint is no longer configured and is dropped" in resumed["stderr"]
    with pytest.raises(UserError, match=r"weights '0\.7': checkpoint .* holds online, 0\.5, 0\.9999, sigma-0\.2"):
        load_model(folder, weights="0.7")


def resumed_rank(config, folder, checkpoint):
    """Averages right after a resume, and what was printed of them."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        run = assemble_rank(config, folder, checkpoint)
    tensors = {f.name: run.engine.ema.tensors(f) for f in run.engine.partitions.fragments()}
    return {"tensors": tensors, "stderr": stderr.getvalue()}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_resume_continues_averages_bit_for_bit(tmp_path, stage):
    config = small_config(parallel={"zero_stage": stage}, train={"micro_batch": 8}, ema={**EMA, "every": 2})
    straight = run_ranks(2, train_rank, config, str(tmp_path / "straight"), 6)
    half = run_ranks(2, train_rank, config, str(tmp_path / "halves"), 3)  # between two updates
    rest = run_ranks(2, train_rank, config, str(tmp_path / "halves"), 6, half[0]["saved"])
    for name in NAMES:
        uninterrupted, resumed = merge_weights(straight, f"ema/{name}"), merge_weights(rest, f"ema/{name}")
        assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted), name
