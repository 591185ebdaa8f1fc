"""Checkpoints that DeepSpeed engines wrote become megadit's, bit for bit, whatever the layout."""

import importlib
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers.foreign.deepspeed_program import CONFIG, KINDS, Case, save_all
from helpers.ranks import run_ranks
from megadit.checkpoint.find import find_checkpoint
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.read import StoredCheckpoint
from megadit.convert.conversion import convert
from megadit.errors import UserError
from megadit.train.prepare import find_start_point
from megadit.train.resume import check_weights_start

pytestmark = pytest.mark.distributed

GRAD32 = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    1: {
        "z0": Case(0, groups="one"),
        "z0-named": Case(0, groups="named"),
        "z0-bf16": Case(0, groups="one", bf16=True),
        "z1": Case(1),
        "z1-elastic": Case(1, zero={"elastic_checkpoint": True}),
        "z2": Case(2, groups="one"),
        "z3": Case(3),
        # What is not enough to go on from:
        "z0-unnamed": Case(0, groups="decay"),
        "z1-sgd": Case(1, optimizer="sgd"),
        "z1-untrained": Case(1, steps=0),
        "z1-frozen": Case(1, frozen=True),
    },
    2: {
        "z0": Case(0, groups="one"),
        "z1": Case(1),
        "z1-bf16": Case(1, bf16=True, ds=GRAD32),  # BF16_Optimizer
        "z2": Case(2, zero={"round_robin_gradients": True}),
        "z2-bf16": Case(2, bf16=True),
        "z3": Case(3, zero={"sub_group_size": 5000}),
        "z3-frozen": Case(3, frozen=True),
    },
    3: {"z1": Case(1), "z3": Case(3, groups="one")},  # shares that do not divide
}
WHOLE = [(n, name) for n, cases in CASES.items() for name, case in cases.items() if case.steps and not case.frozen]
WHOLE = [(n, name) for n, name in WHOLE if "unnamed" not in name and "sgd" not in name]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of all checkpoints (RANKS/NAME) and their states as the engines told them."""
    root = tmp_path_factory.mktemp("foreign")
    states = {n: run_ranks(n, save_all, str(root / str(n)), cases)[0] for n, cases in CASES.items()}
    # With round_robin_gradients DeepSpeed's own calls name the wrong parameters; the same training without it is z1.
    states[2]["z2"] = states[2]["z1"]
    return root, states


def bring(source, out, kind="deepspeed"):
    outcome = convert(kind, "megadit", source, out, CONFIG)
    return StoredCheckpoint(find_checkpoint(out)), outcome


def assert_same(stored, state, kinds=tuple(KINDS)):
    with stored.reader() as reader:
        for kind in kinds:
            assert state[kind].keys() <= stored.parameters.keys() and state[kind]
            for name, value in state[kind].items():
                flat = torch.full((value.numel(),), float("nan"))
                reader.read_into(flat, kind, name)
                assert torch.equal(flat.view(value.shape), value), f"{kind} of {name}"


@pytest.mark.parametrize(("ranks", "name"), WHOLE)
def test_native_checkpoints_come_in_bit_for_bit(written, tmp_path, ranks, name):
    root, states = written
    stored, outcome = bring(root / str(ranks) / name, tmp_path / "run")
    assert_same(stored, states[ranks][name])
    assert verify(stored) == []
    assert stored.position.step == outcome.step == stored.state["adam_step"] - (name == "z0-bf16") == 2
    assert stored.position.samples_seen == 2 * CONFIG.train.global_batch
    notes = " ".join(outcome.notes)
    if name != "z1-elastic":  # which does not store its groups
        assert "lr 0.003, weight_decay 0.02" in notes and "from the config" in notes
    assert stored.state["groups"][0]["name"] == "input"  # megadit's own, from the config
    assert find_start_point(SimpleNamespace(run_dir=tmp_path / "run", resume="auto", config=CONFIG))[0].step == 2


@pytest.mark.parametrize(
    ("ranks", "name", "reason"),
    [
        (1, "z0-unnamed", "does not say which moments are of which parameter"),
        (1, "z1-sgd", "the optimizer is not Adam .*momentum_buffer"),
        (1, "z1-untrained", "has taken no step"),
        (1, "z1-frozen", "frozen parameters have no moments .y_embedder"),
        (2, "z3-frozen", "frozen parameters have no moments .y_embedder"),
    ],
)
def test_without_usable_moments_the_weights_come_in_alone_and_that_is_told(written, tmp_path, ranks, name, reason):
    root, states = written
    stored, outcome = bring(root / str(ranks) / name, tmp_path / "run")
    assert_same(stored, states[ranks][name], ["weights"])
    assert stored.kinds == ("weights",)
    assert re.search(f"weights only: .*{reason}", " ".join(outcome.notes))
    start = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"init_from": str(tmp_path / "run")})})
    assert check_weights_start(start) == stored.path


def restored(run_dir, folder):
    """What a megadit run that resumes from the imported checkpoint holds on this rank."""
    from helpers.training import assemble_rank

    run = assemble_rank(CONFIG, folder, str(find_checkpoint(run_dir)))
    partitions, rates = run.engine.partitions, []
    for f in partitions.fragments():
        for kind, values in {"weights": f.values, **partitions.moments(f)}.items():
            rates.append((kind, f.name, f.start, f.stop, values.detach().clone()))
    return run.position.step, partitions.adam_step(), rates


def test_a_run_goes_on_from_an_imported_checkpoint(written, tmp_path):
    root, states = written
    bring(root / "2" / "z3", tmp_path / "run")
    for step, adam_step, rates in run_ranks(2, restored, tmp_path / "run", str(tmp_path / "on")):
        assert (step, adam_step) == (2, 2) and rates
        for kind, name, start, stop, values in rates:
            assert torch.equal(values, states[2]["z3"][kind][name].flatten()[start:stop])


@pytest.mark.parametrize(("ranks", "name"), [(2, "z1"), (2, "z2-bf16"), (2, "z3"), (1, "z2")])
def test_universal_checkpoints_of_deepspeeds_own_tool_come_in(written, tmp_path, ranks, name):
    root, states = written
    module = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    out = tmp_path / "universal" / "global_step2_universal"
    module.main(
        SimpleNamespace(
            input_folder=str(root / str(ranks) / name / "global_step2"),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    stored, outcome = bring(tmp_path / "universal", tmp_path / "run", "deepspeed-universal")
    assert_same(stored, states[ranks][name])
    assert stored.position.step == stored.state["adam_step"] == 2
    assert any("lr 0.003" in note for note in outcome.notes)
    shutil.rmtree(out / "zero" / "final_layer.linear.bias")
    with pytest.raises(UserError, match=r"final_layer.linear.bias.fp32.pt: is missing"):
        bring(out, tmp_path / "again", "deepspeed-universal")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("shard", [None, "100KB"])
def test_results_of_zero_to_fp32_come_in(written, tmp_path, safe, shard):
    root, states = written
    module = importlib.import_module("deepspeed.utils.zero_to_fp32")
    out, source = tmp_path / "fp32", root / "2" / ("z2" if safe else "z3")
    module.convert_zero_checkpoint_to_state_dict(str(source), str(out), max_shard_size=shard, safe_serialization=safe)
    assert len(list(out.iterdir())) > 2 if shard else len(list(out.iterdir())) == 1
    stored, outcome = bring(out, tmp_path / "run", "fp32-state-dict")
    assert_same(stored, states[2][source.name], ["weights"])
    assert stored.kinds == ("weights",) and stored.position.step == 0
    assert any("train.init_from" in note for note in outcome.notes)


SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
BROKEN = {
    "a rank's file": ("2/z2", lambda f: (f / SHARD.format(1)).unlink(), "zero_pp_rank_1_.*all ranks"),
    "all ranks' files": (
        "1/z1",
        lambda f: (f / SHARD.format(0)).unlink(),
        "of 1 ranks, and 1 of their files",
    ),
    "the model file": ("1/z1", lambda f: (f / MODEL).unlink(), "is no DeepSpeed checkpoint"),
    "a torn file": ("2/z1", lambda f: tear(f / SHARD.format(1)), "rank_1_.*cannot be read as a torch file"),
    "a tensor-parallel rank": ("1/z1", lambda f: (f / "mp_rank_01_model_states.pt").touch(), "tensor or pipeline"),
    "a pipeline's layers": ("1/z1", lambda f: (f / "layer_01_model_states.pt").touch(), "tensor or pipeline"),
}


def tear(file):
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_told_and_nothing_is_written(written, tmp_path, what):
    name, damage, reason = BROKEN[what]
    source = tmp_path / "copy"
    shutil.copytree(written[0] / name, source)
    damage(source / "global_step2")
    with pytest.raises(UserError, match=reason):
        bring(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_weights_of_another_shape_do_not_fit_the_config(written, tmp_path):
    wide = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"width": 64, "heads": 4})})
    with pytest.raises(UserError, match=r"has shape .*the model needs .*; give the --config of the run"):
        convert("deepspeed", "megadit", written[0] / "2" / "z3", tmp_path / "run", wide)
    assert not list(tmp_path.iterdir())


def test_another_format_is_named(written, tmp_path):
    with pytest.raises(UserError, match=r"no universal DeepSpeed checkpoint|--from deepspeed"):
        bring(written[0] / "1" / "z1", tmp_path / "run", "deepspeed-universal")
    with pytest.raises(UserError, match="is no safetensors file"):
        bring(written[0] / "1" / "z1", tmp_path / "run", "safetensors")
    with pytest.raises(UserError, match="no checkpoint"):
        convert("megadit", "safetensors", written[0] / "1" / "z1", tmp_path / "x.safetensors")
