"""What a start does with checkpoints that are broken, older, of another model, or taken for their weights alone."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import run_ranks
from helpers.training import layout_of, small_config, train_rank
from megadit.checkpoint.find import find_checkpoint, load_model
from megadit.checkpoint.format import Index
from megadit.checkpoint.fragment_files import write_fragments
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.write import write_index
from megadit.config.schema.data import FeatureSource
from megadit.config.schema.model import RepaConfig
from megadit.errors import UserError
from megadit.models import build_model

STEPS = {"steps": 6, "checkpoint_every": 2, "keep_last": 3}


def start(config, folder, resume="auto", patch=None):
    """A whole start on one rank: exit code or error, and what it said."""
    import contextlib
    import io

    from megadit.data import build_datasets
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    if patch is not None:
        patch()
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            outcome = pretrain(TrainingJob(config, ds_config, Path(folder), resume, *build_datasets(config.data)))
        except UserError as error:
            outcome = str(error)
    return outcome, stderr.getvalue()


def rows(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["samples_seen"]) for row in records]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two ranks under ZeRO-1 with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(parallel={"zero_stage": 1}, train=STEPS, ema={"decays": (0.5,)})
    assert run_ranks(2, start, config, str(folder))[0][0] == 0
    return folder, config


@pytest.fixture
def copy(trained, tmp_path):
    """The same, free to be damaged: the end is taken away, so that there is something left to do."""
    folder, config = trained
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    shutil.rmtree(copied / "checkpoints/step-00000006")
    (copied / "checkpoints/latest").write_text("step-00000004\n")
    return copied, config


def damage(checkpoint, rank):
    """Change one bit in the last bytes of one rank's data."""
    path = checkpoint / f"fragments-{rank:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_that_one_rank_finds_changed_sends_all_to_the_one_before(trained, copy, rank):
    folder, config = copy
    damage(folder / "checkpoints/step-00000004", rank)
    (code, stderr), (other, silent) = run_ranks(2, start, config, str(folder))
    assert (code, other) == (0, 0)
    assert re.search(r"warning: .*step-00000004.*wrong checksum; going on from step-00000002", stderr)
    assert "at step 2" in stderr and silent == ""
    assert rows(folder) == rows(trained[0])  # bit for bit, each step once
    assert verify(StoredCheckpoint(find_checkpoint(folder))) == []


def spoil(checkpoint, rank, kind):
    """Put a NaN among a rank's values of ``kind``, as training that went wrong would have written it."""
    index, name = Index.read(checkpoint), f"fragments-{rank:05d}.safetensors"
    fragments = [fragment for fragment in index.fragments if fragment.file == name]
    values = {key: value.clone() for key, value in load_file(checkpoint / name).items()}  # which is overwritten
    next(values[fragment.key] for fragment in fragments if fragment.kind == kind)[0] = float("nan")
    record, written = write_fragments(checkpoint / name, [(fragment, values[fragment.key]) for fragment in fragments])
    others = [fragment for fragment in index.fragments if fragment.file != name]
    changed = replace(index, fragments=[*others, *written], files={**index.files, name: record})
    write_index(checkpoint, changed, json.loads((checkpoint / "state.json").read_text()))


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "kind"), [(0, "weights"), (1, "exp_avg")])
def test_values_that_are_not_finite_send_all_to_the_one_before(copy, rank, kind):
    folder, config = copy
    spoil(folder / "checkpoints/step-00000004", rank, kind)
    (code, stderr), _ = run_ranks(2, start, config, str(folder))
    assert code == 0
    warning = rf"warning: .*step-00000004: of its {kind}, '[\w.]+' holds 1 NaN of .*; going on from step-00000002"
    assert re.search(warning, stderr)


def test_weights_that_are_not_finite_begin_no_run_and_draw_nothing(copy, tmp_path):
    folder, config = copy
    four = folder / "checkpoints/step-00000004"
    spoil(four, 0, "weights")
    spoil(four, 1, "ema/0.5")
    for weights, kind in (("online", "weights"), ("0.5", "ema/0.5")):
        with pytest.raises(UserError, match=rf"of its {kind}, '[\w.]+' holds 1 NaN of"):
            load_model(folder, str(four), weights=weights)
    fresh = config.model_copy(update={"train": config.train.model_copy(update={"init_from": str(four)})})
    (outcome, _), *_ = run_ranks(1, start, fresh, str(tmp_path / "new"))
    assert re.search(r"step-00000004: of its weights, '[\w.]+' holds 1 NaN of", str(outcome))


@pytest.mark.distributed
def test_a_named_or_only_broken_one_is_an_error(copy):
    folder, config = copy
    four, two = (folder / f"checkpoints/step-0000000{n}" for n in (4, 2))
    before = rows(folder)
    damage(four, 1)
    outcomes = run_ranks(2, start, config, str(folder), str(four))
    assert all("step-00000004: exp" not in out and "wrong checksum" in out for out, _ in outcomes)
    damage(two, 0)
    outcomes = run_ranks(2, start, config, str(folder))
    assert all("no earlier checkpoint of the run is sound" in out for out, _ in outcomes)
    assert json.loads((folder / "exit.json").read_text())["code"] == 2
    assert rows(folder) == before and four.is_dir() and two.is_dir()  # nothing was touched


@pytest.mark.distributed
def test_weights_alone_begin_a_run_and_only_once(trained, tmp_path):
    source, config = trained
    target = tmp_path / "new"
    given = {"init_from": str(source), "init_from_ema": "0.5", "steps": 2, "checkpoint_every": 1, "seed": 5}
    config = config.model_copy(update={"train": config.train.model_copy(update=given)})
    code, stderr = run_ranks(1, start, config, str(target))[0]
    assert code == 0 and "starting at step 0 from the weights (average 0.5) of" in stderr
    first = StoredCheckpoint(target / "checkpoints/step-00000001")
    assert (first.position.step, first.state["adam_step"], first.position.samples_seen) == (1, 1, 16)
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3, "init_from": "nowhere"})})
    code, stderr = run_ranks(1, start, more, str(target))[0]
    assert code == 0 and "at step 2" in stderr and "beginning" not in stderr


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1])
def test_a_projector_that_the_weights_lack_starts_afresh(trained, tmp_path, stage):
    source, config = trained
    train = config.train.model_copy(update={"init_from": str(source), "steps": 1, "checkpoint_every": None})
    model = config.model.model_copy(update={"repa": RepaConfig(block=1, feature_dim=112, hidden=16)})
    objective = config.objective.model_copy(update={"repa_weight": 0.5})
    features = FeatureSource(image_size=32)
    changes = {"train": train, "model": model, "objective": objective}
    changes |= {"data": config.data.model_copy(update={"features": features})}
    changes |= {"parallel": config.parallel.model_copy(update={"zero_stage": stage})}
    given = config.model_copy(update=changes)
    code, stderr = run_ranks(1, start, given, str(tmp_path), "auto", _no_learning)[0]
    assert code == 0 and "note: the projector of REPA is not in the checkpoint and starts afresh" in stderr
    (_, before), (_, after) = load_model(source), load_model(tmp_path)
    parameters = dict(after.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.named_parameters())
    fresh = dict(build_model(model, seed=config.train.seed).named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in fresh.items() if name.startswith("repa."))


def _no_learning():
    from megadit.engine.schedule import Schedule

    Schedule.factor = lambda self, step: 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_alone_are_those_of_the_checkpoint(trained, tmp_path, stage):
    source, config = trained
    train = config.train.model_copy(update={"init_from": str(source), "steps": 1, "checkpoint_every": None})
    parallel = config.parallel.model_copy(update={"zero_stage": stage})
    config = config.model_copy(update={"train": train, "parallel": parallel})
    run_ranks(2, start, config, str(tmp_path), "auto", _no_learning)
    expected, *models = (
        load_model(f, weights=w)[1] for f, w in ((source, "online"), (tmp_path, "online"), (tmp_path, "0.5"))
    )
    for model in models:  # the average begins at these weights too
        for old, new in zip(expected.parameters(), model.parameters(), strict=True):
            assert torch.equal(old, new)


@pytest.mark.distributed
def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    from types import SimpleNamespace

    from megadit.train.prepare import find_start_point

    source, _ = trained

    def refused(**sections):
        with pytest.raises(UserError) as caught:
            find_start_point(SimpleNamespace(run_dir=tmp_path / "new", resume="auto", config=small_config(**sections)))
        return str(caught.value)

    given = {"init_from": str(source)}
    assert "has shape" in refused(train=given, model={"width": 64, "heads": 4})
    assert "has a parameter 'blocks.1" in refused(train=given, model={"depth": 1})
    assert "holds online, 0.5; choose one" in refused(train={**given, "init_from_ema": "0.9"})
    assert "train.init_from: 'nowhere' is no checkpoint" in refused(train={"init_from": "nowhere"})
    with pytest.raises(ValueError, match="init_from_ema: 0.9 is an average of the checkpoint init_from"):
        small_config(train={"init_from_ema": 0.9})
    other = small_config(model={"output_mult": 2.0})  # the same shapes: another function of the same weights
    with pytest.raises(UserError, match=r"model\.output_mult 1.0 → 2.0.*train\.init_from="):
        find_start_point(SimpleNamespace(run_dir=tmp_path / "new", resume=str(source), config=other))


def _rewrite(checkpoint, change):
    index, state = Index.read(checkpoint), json.loads((checkpoint / "state.json").read_text())
    write_index(checkpoint, change(index), state)


def _without(kinds):
    def change(index):
        fragments = [fragment for fragment in index.fragments if not fragment.kind.startswith(kinds)]
        return Index(index.parameters, fragments, index.files, index.block)

    return change


@pytest.mark.distributed
def test_averages_that_come_and_go_are_told(copy):
    folder, config = copy
    _rewrite(folder / "checkpoints/step-00000004", _without("ema/"))
    changed = config.model_copy(update={"ema": config.ema.model_copy(update={"decays": (0.5, 0.25)})})
    stderr = run_ranks(2, start, changed, str(folder))[0][1]
    assert "note: ema/0.25 is not in the checkpoint and starts from its weights" in stderr
    longer = {"train": config.train.model_copy(update={"steps": 7})}
    stderr = run_ranks(1, start, config.model_copy(update=longer), str(folder))[0][1]
    assert "note: ema/0.25 of the checkpoint is no longer configured and is dropped" in stderr


@pytest.mark.distributed
def test_missing_pieces_and_weights_alone_are_no_state_to_go_on_from(copy):
    folder, config = copy
    four = folder / "checkpoints/step-00000004"
    whole = Index.read(four)
    _rewrite(four, lambda index: Index(index.parameters, index.fragments[:-1], index.files, index.block))
    assert any("are missing" in problem for problem in verify(StoredCheckpoint(four)))
    _rewrite(four, lambda _: _without("exp_avg")(whole))
    out = run_ranks(1, start, config, str(folder))[0][0]
    assert "holds weights without optimizer state" in out and "train.init_from=" in out


@pytest.mark.distributed
def test_format_1_is_still_read(trained, copy):
    """Version 1 had no checksums, no sizes and no files in its index."""
    folder, config = copy
    four = folder / "checkpoints/step-00000004"
    index = Index.read(four)
    names = ("kind", "name", "start", "stop", "file")
    fragments = [{name: getattr(fragment, name) for name in names} for fragment in index.fragments]
    old = {"format": "megadit-checkpoint", "version": 1, "parameters": index.parameters, "pieces": fragments}
    (four / "index.json").write_text(json.dumps(old))
    code, stderr = run_ranks(2, start, config, str(folder))[0]
    assert code == 0 and "at step 4" in stderr
    assert rows(folder) == rows(trained[0])


def _terminated_at_3():
    from megadit.engine.engine import TrainingEngine

    train_batch = TrainingEngine.train_batch

    def with_signal(engine, step, *rest):
        if step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes it on once more
        return train_batch(engine, step, *rest)

    TrainingEngine.train_batch = with_signal


@pytest.mark.distributed
def test_sigterm_is_answered_with_a_checkpoint(tmp_path):
    config = small_config(train={"steps": 6, "log_every": 6})
    code, stderr = run_ranks(1, start, config, str(tmp_path), "auto", _terminated_at_3)[0]
    assert code == 85 and f"preempted: saved step 3 in {tmp_path / 'checkpoints'}; to go on" in stderr
    assert find_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.distributed
def test_a_run_that_was_taken_back_goes_on_from_there_again(copy):
    """Killed before it saved anew, it must not return to the abandoned branch: its metrics were cut."""
    folder, config = copy
    two = folder / "checkpoints/step-00000002"

    assert run_ranks(2, train_rank, config, str(folder), 2, str(two))  # begins there, makes no step
    assert (folder / "checkpoints/latest").read_text() == "step-00000002\n"
