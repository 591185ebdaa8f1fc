"""A megadit run's checkpoint goes out: DeepSpeed engines with groups of their own load it, others read the weights."""

import math

import pytest
import torch
from safetensors.torch import load_file

from helpers.foreign.deepspeed_program import CONFIG, LR, Case, engine_of, state_of, train
from helpers.ranks import run_ranks
from helpers.training import small_config
from megadit.checkpoint.find import find_checkpoint, load_model
from megadit.checkpoint.read import StoredCheckpoint
from megadit.convert import state_dicts
from megadit.convert.conversion import convert
from megadit.errors import UserError

pytestmark = pytest.mark.distributed

WITH_EMA = small_config(ema={"decays": (0.9,)})
UNIVERSAL = {"checkpoint": {"load_universal": True}}
STEPS = 3


def write_run(folder):
    """A short run of megadit's own, saved."""
    from helpers.training import train_rank
    from megadit.config import save_config

    train_rank(WITH_EMA, folder, steps=STEPS)
    if torch.distributed.get_rank() == 0:
        save_config(WITH_EMA, f"{folder}/config.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory, and what its checkpoint holds by kind and name."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, write_run, str(folder))
    return folder, state(folder)


def state(folder):
    stored, values = StoredCheckpoint(find_checkpoint(folder)), {}
    with stored.reader() as reader:
        for kind in stored.kinds:
            for name, shape in stored.parameters.items():
                flat = torch.empty(math.prod(shape))
                reader.read_into(flat, kind, name)
                values.setdefault(kind, {})[name] = flat.view(shape)
    return values


def load(folder, cases, options):
    """Load into fresh engines of other weights: what they hold, their rates and steps, the losses of further ones."""
    results = []
    for case in cases:
        engine = engine_of(case, seed=9)
        path, _ = engine.load_checkpoint(folder, **options)
        assert path is not None
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        tensors, steps = state_of(engine, moments=not options), engine.global_steps
        for parameter_state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
            # Stage 3 shares the step between the groups, see docs/convert.md.
            parameter_state["step"] = parameter_state["step"].clone()
        results.append((tensors, rates, steps, train(engine, 3)))
        engine.destroy()
    return results


def assert_equal(loaded, expected, weights="weights"):
    for kind, values in loaded.items():
        assert values.keys() == expected[kind].keys()
        for name, value in values.items():
            assert torch.equal(value, expected[weights if kind == "weights" else kind][name]), f"{kind} of {name}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_universal_export_loads_at_every_sharding_stage(run, tmp_path, ranks):
    folder, expected = run
    convert("megadit", "deepspeed-universal", folder, tmp_path / "out")
    cases = [Case(1, ds=UNIVERSAL), Case(2, groups="one", ds=UNIVERSAL), Case(3, ds=UNIVERSAL)]
    losses = []
    for (loaded, rates, steps, loss), case in zip(
        run_ranks(ranks, load, str(tmp_path / "out"), cases, {})[0], cases, strict=True
    ):
        assert_equal(loaded, expected)
        assert rates == [LR] if case.groups == "one" else [LR, 2 * LR]  # the engine's own
        assert steps == STEPS
        losses.append(loss)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)  # with other groups, what follows differs


def test_a_native_export_loads_at_stage_0_and_its_weights_elsewhere(run, tmp_path):
    folder, expected = run
    convert("megadit", "deepspeed", folder, tmp_path / "out")
    loaded, rates, steps, _ = run_ranks(2, load, str(tmp_path / "out"), [Case(0, groups="megadit")], {})[0][0]
    assert_equal(loaded, expected)
    assert steps == STEPS and rates[0] == CONFIG.optim.lr
    loaded, rates, steps, _ = run_ranks(2, load, str(tmp_path / "out"), [Case(2)], {"load_module_only": True})[0][0]
    assert_equal(loaded, expected)
    assert (rates, steps) == ([LR, 2 * LR], 0)


def test_an_average_goes_out_as_the_weights(run, tmp_path):
    folder, expected = run
    outcome = convert("megadit", "deepspeed-universal", folder, tmp_path / "universal", ema="0.9")
    assert outcome.kinds == ("weights",) and "these are the average 0.9" in outcome.notes[0]
    cases = [Case(1, ds=UNIVERSAL), Case(3, ds=UNIVERSAL)]
    for loaded, *_ in run_ranks(1, load, str(tmp_path / "universal"), cases, {})[0]:
        assert not any(value.any() for kind in ("exp_avg", "exp_avg_sq") for value in loaded.pop(kind).values())
        assert_equal(loaded, expected, "ema/0.9")
    again = convert("deepspeed-universal", "safetensors", tmp_path / "universal", tmp_path / "z.safetensors")
    assert again.kinds == ("weights",)
    convert("megadit", "deepspeed", folder, tmp_path / "native", ema="0.9")
    loaded = run_ranks(1, load, str(tmp_path / "native"), [Case(0)], {"load_module_only": True})[0][0][0]
    assert_equal(loaded, expected, "ema/0.9")
    convert("megadit", "safetensors", folder, tmp_path / "x.safetensors", ema="0.9")
    assert_equal({"weights": load_file(tmp_path / "x.safetensors")}, expected, "ema/0.9")
    with pytest.raises(UserError, match=r"'0.5'.*holds online, 0.9"):
        convert("megadit", "safetensors", folder, tmp_path / "y.safetensors", ema="0.5")


@pytest.mark.parametrize("through", ["deepspeed", "deepspeed-universal"])
def test_out_and_in_again_is_the_same_checkpoint(run, tmp_path, through):
    folder, expected = run
    outcome = convert("megadit", through, folder, tmp_path / "out")
    assert any("averages 0.9 are left out" in note for note in outcome.notes)
    back_result = convert(through, "megadit", tmp_path / "out", tmp_path / "back", CONFIG)
    group_notes = [
        note for note in back_result.notes if "learning rates" in note
    ]  # a universal export lists groups without numbers
    assert bool(group_notes) == (through == "deepspeed") and all("hidden: lr " in note for note in group_notes)
    reimported = state(tmp_path / "back")
    assert list(reimported) == ["weights", "exp_avg", "exp_avg_sq"]
    assert_equal(reimported, expected)
    before, after = (StoredCheckpoint(find_checkpoint(each)) for each in (folder, tmp_path / "back"))
    assert after.position == before.position and after.state["adam_step"] == before.state["adam_step"] == STEPS
    assert after.state["groups"] == before.state["groups"]


@pytest.mark.parametrize("kind", ["safetensors", "fp32-state-dict"])
@pytest.mark.parametrize("limit", [5 * 10**9, 50_000])
def test_plain_weights_are_read_by_any_loader(run, tmp_path, monkeypatch, kind, limit):
    folder, expected = run
    monkeypatch.setattr(state_dicts, "SHARD_BYTES", limit)
    convert("megadit", kind, folder, tmp_path / "out")
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix != ".json")
    assert len(files) > 2 if limit == 50_000 else len(files) == 1
    weights = {}
    for file in files:
        weights |= load_file(file) if kind == "safetensors" else torch.load(file, weights_only=True)
    assert_equal({"weights": weights}, expected)
    _, model = load_model(folder)
    model.load_state_dict(weights)
    convert(kind, "megadit", tmp_path / "out", tmp_path / "back", CONFIG)
    assert_equal(state(tmp_path / "back"), expected)
