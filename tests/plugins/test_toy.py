"""A plugin of a user's does all that megadit's own parts do, with no edit to the package: see ``toy``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from helpers.plugins import HOME, plugins_taken_back, toy_loaded, write_plugin
from helpers.ranks import run_command, run_ranks
from helpers.training import assemble_rank, train_on
from megadit.cli import (
    base_shapes,
    convert_checkpoint,
    coord_check,
    evaluate,
    inspect_checkpoint,
    make_shards,
    mup_table,
    pretrain,
    sample,
    sweep,
    transfer,
)
from megadit.config import load_config, preset
from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import build_codec
from megadit.errors import UserError
from megadit.extensions import PLUGINS
from megadit.files.paths import save_tensors
from megadit.plugins import Plugin, load_plugins, loaded_plugins

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
CONFIG: dict[str, Any] = {
    "base": str(ROOT / "configs" / "quickstart" / "digits.yaml"),
    "model": {"family": "toy", "width": 32, "depth": 2, "options": {"pool": 0.5}, "num_classes": 2},
    "data": {"name": "stripes"},
    "optim": {"schedule": "inverse-sqrt", "lr": 0.004},
    "train": {
        "steps": STEPS, "global_batch": 16, "log_every": 1, "callbacks": ["countdown"], "tensorboard": False,
        "validation_images": 0, "checkpoint_every": 3,
    },
    "sample": {"count": 4, "steps": 2},
}  # fmt: skip
NAMED = r"^plugins: .* names toy 1\.0, and reading it imports nothing; .* give --plugins toy$"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's configuration, which names no plugin."""
    file = tmp_path_factory.mktemp("toy") / "toy.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """A run of the real command."""
    folder = config.parent / "run"
    words = ["--plugins", "toy", "--config", str(config), "--run_dir", str(folder)]
    done = run_command([sys.executable, "launch/pretrain.py", *words], env={"PYTHONPATH": str(HOME)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def toy() -> Iterator[None]:
    """The plugin in this process."""
    with toy_loaded():
        yield


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the plugin's name where it would be found, which leaves a marker when it is imported."""
    write_plugin(tmp_path, "def register():\n    pass\n", "toy")
    monkeypatch.chdir(tmp_path)
    with plugins_taken_back():
        sys.path.insert(0, str(tmp_path))
        yield tmp_path / "imported"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of_rank(config: Any, folder: str) -> list[float]:
    """The first steps on this rank."""
    return [record["loss"] for record in train_on(assemble_rank(config, folder), STEPS)]


class TestTraining:
    def test_the_real_command_trains_on_what_the_plugin_brings(self, run: Path) -> None:
        table = rows(run)
        assert [row["steps_left"] for row in table] == list(range(STEPS - 1, -1, -1))
        assert [row["lr"] for row in table] == pytest.approx([0.004 * step**-0.5 for step in range(1, STEPS + 1)])
        assert table[-1]["loss"] < table[0]["loss"]
        assert json.loads((run / "classes.json").read_text()) == ["lying", "standing"]

    def test_what_it_was_trained_with_is_recorded(self, run: Path, toy: None) -> None:
        (plugin,) = loaded_plugins()
        index = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "index.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert [vars(plugin)] == index["plugins"] == environment["plugins"] == saved["plugins"]
        assert plugin.version == "1.0" and load_config(run / "config.yaml").plugins[0].sha256 == plugin.sha256

    @pytest.mark.parametrize("layout", ["tensor", "pipeline"])
    def test_two_ranks_that_share_the_model_have_the_same_losses(
        self, config: Path, run: Path, toy: None, tmp_path: Path, layout: str
    ) -> None:
        shared = load_config(config, [f"parallel.{layout}=2", *(["parallel.zero_stage=1"] * (layout == "pipeline"))])
        expected = [row["loss"] for row in rows(run)]
        for losses in run_ranks(2, losses_of_rank, shared, str(tmp_path)):
            assert losses == pytest.approx(expected, rel=1e-5)

    def test_its_presets_are_presets(self, toy: None) -> None:
        assert (preset("toy-s").family, preset("toy-s").width) == ("toy", 64)


class TestCoordinateCheck:
    WORDS = ("--widths", "32,64,128", "--steps", "5", "--seeds", "1", "--batch", "8", "--json", "model.depth=1")

    def check(self, config: Path, out: Path, *overrides: str) -> int:
        words = ["--plugins", "toy", "--config", str(config), "--out", str(out), *self.WORDS, *overrides]
        return coord_check.main(words)

    def test_it_passes(self, config: Path, toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.check(config, tmp_path) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "passes"

    def test_a_layer_of_wrong_dims_is_named(
        self, config: Path, toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.check(config, tmp_path, "model.family=toy-faulty", "model.options={}") == 3
        printed = json.loads(capsys.readouterr().out)
        assert printed["verdict"] == "broken" and "mlp.fc2" in json.dumps(printed)


class TestAfterTraining:
    def test_it_samples_and_a_metric_scores_the_pictures(
        self, run: Path, toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures = tmp_path / "p.npz"
        outputs = ["--out", str(tmp_path / "p.png"), "--npz", str(pictures)]
        assert sample.main([str(run), "--plugins", "toy", *outputs]) == 0

        capsys.readouterr()
        assert evaluate.main(["brightness", str(pictures), "--json", "--plugins", "toy"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == {"brightness": pytest.approx(np.load(pictures)["arr_0"].mean(), rel=1e-4)}
        assert evaluate.main(["--plugins", "toy", "brightness", str(pictures)]) == 0
        assert capsys.readouterr().out.startswith("brightness ")
        with pytest.raises(UserError, match=r"^evaluate: 'bright' is no metric; did you mean brightness\? A plugin's "):
            evaluate.main(["bright", str(pictures)])

    def test_it_converts_to_safetensors_and_back(
        self, run: Path, toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from megadit.checkpoint.find import load_model

        there, back = tmp_path / "model.safetensors", tmp_path / "back"
        for words in (("megadit", "safetensors", run, there), ("safetensors", "megadit", there, back)):
            source, target, *paths = map(str, words)
            assert convert_checkpoint.main(["--from", source, "--to", target, "--plugins", "toy", *paths]) == 0
        (first, one), (second, other) = load_model(run), load_model(back)
        assert first.model == second.model and first.plugins == second.plugins
        weights = other.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())

    def test_other_sources_than_recorded_are_told(
        self, config: Path, run: Path, toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        was, now = loaded_plugins()[0], Plugin("toy", "1.1", "f" * 64)
        PLUGINS["toy"] = now
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        note = f"plugin {now} is not what was recorded, {was}"
        sample.main([str(copy), "--plugins", "toy"])
        assert f"warning: {note}\n" in capsys.readouterr().err
        words = ["--from", "megadit", "--to", "safetensors", str(copy), str(tmp_path / "m.safetensors")]
        convert_checkpoint.main([*words, "--plugins", "toy"])
        assert f"warning: {note}\n" in capsys.readouterr().err
        more = ["--config", str(config), "--run_dir", str(copy), f"train.steps={STEPS + 1}"]
        assert pretrain.main([*more, "--plugins", "toy"]) == 0
        assert f"note: {note}\n" in capsys.readouterr().err
        (change,) = map(json.loads, (copy / "changes.jsonl").read_text().splitlines())
        assert note in change["notes"]


def test_a_codec_is_known_by_the_name_in_its_folder(toy: None, tmp_path: Path) -> None:
    facts = {"_class_name": "BlockMeans", "factor": 2, "channels": 1, "image_channels": 1, "scaling_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    save_tensors(tmp_path / "none.safetensors", {"none": torch.zeros(1)})
    codec = build_codec(VaeConfig(path=str(tmp_path), factor=2))
    flat = torch.rand(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = codec.encode(flat, torch.arange(3))
    assert latents.shape == (3, 1, 4, 4) and torch.allclose(codec.decode(latents), flat)


# A command that reads an artefact, and its words; RUN, CONFIG (that of RUN) and OUT are filled in.
READERS: list[tuple[Callable[[Sequence[str]], int], str]] = [
    (sample.main, "RUN"),
    (inspect_checkpoint.main, "RUN"),
    (inspect_checkpoint.main, "RUN/checkpoints/step-00000003 --verify"),
    (convert_checkpoint.main, "--from megadit --to safetensors RUN OUT"),
    (convert_checkpoint.main, "--from megadit --to diffusers RUN/checkpoints/step-00000003 OUT"),
    (mup_table.main, "--config CONFIG"),
    (base_shapes.main, "--config CONFIG --out OUT"),
    (coord_check.main, "--config CONFIG --out OUT"),
    (make_shards.main, "--config CONFIG --out OUT"),
    (pretrain.main, "--config CONFIG --run_dir OUT"),
    (pretrain.main, "--config CONFIG --run_dir OUT --dry_run"),
]


class TestNothingIsImportedForAnArtefact:
    @pytest.mark.parametrize(("command", "words"), READERS, ids=[f"{c.__module__}-{w[:30]}" for c, w in READERS])
    def test_a_run(
        self, run: Path, trap: Path, tmp_path: Path, command: Callable[[Sequence[str]], int], words: str
    ) -> None:
        paths = {"RUN": str(run), "CONFIG": str(run / "config.yaml"), "OUT": str(tmp_path / "out")}
        filled = [paths.get(word, word.replace("RUN/", f"{run}/")) for word in words.split()]
        with pytest.raises(UserError, match=NAMED):
            command(filled)
        assert not trap.exists()

    def test_a_checkpoint_that_a_run_is_to_begin_with(self, run: Path, trap: Path, tmp_path: Path) -> None:
        words = [f"train.init_from={run}", "train.steps=1", "--run_dir", str(tmp_path / "out")]
        digits = str(ROOT / "configs" / "quickstart" / "digits.yaml")
        with pytest.raises(UserError, match=NAMED):
            pretrain.main(["--config", digits, *words, "--dry_run"])
        assert not trap.exists()

    def test_exported_weights(self, run: Path, trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        weights = str(tmp_path / "model.safetensors")
        with toy_loaded():
            convert_checkpoint.main(["--from", "megadit", "--to", "safetensors", str(run), weights])
        with pytest.raises(UserError, match=NAMED):
            convert_checkpoint.main(["--from", "safetensors", "--to", "megadit", weights, str(tmp_path / "back")])
        assert not trap.exists()

    def test_a_study_and_its_workers(self, trap: Path, tmp_path: Path) -> None:
        from megadit.search.study.study import load_study, save_study
        from megadit.search.workers.pool import worker_command
        from megadit.search.workers.worker import main as work_on

        file = write_study(tmp_path, plugins=["toy"])
        with toy_loaded():
            save_study(load_study(file, tmp_path / "study"))
            assert worker_command(tmp_path / "study", 1)[-2:] == [str(tmp_path / "study"), "toy"]
        study = str(tmp_path / "study")
        for command in (
            lambda: work_on([study]),
            lambda: sweep.main(["worker", "--study_dir", study]),
            lambda: sweep.main(["run", "--config", study]),
            lambda: sweep.main(["status", "--study_dir", study]),
            lambda: transfer.main(["verify", study]),
            lambda: transfer.main(["apply", study, "--target", str(file)]),
        ):
            with pytest.raises(UserError, match=NAMED.replace("1\\.0", r"1\.0")):
                command()
        assert not trap.exists()


def write_study(folder: Path, **keys: Any) -> Path:
    """Two learning rates of the toy family."""
    study = {
        "base": {name: section for name, section in CONFIG.items() if name != "base"}
        | {"model": {**CONFIG["model"], "patch_size": 2, "in_channels": 1, "input_size": 8, "head_dim": 16,
                     "learn_sigma": False},
           "objective": {"kind": "flow"}},
        "space": {"optim.lr": {"grid": [0.002, 0.004]}},
        "sampler": "grid",
        "scores": [{"name": "loss", "kind": "train_loss", "last": 3}],
        "diverged_above": None,
        **keys,
    }  # fmt: skip
    file = folder / "toys.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def agreed(folders: list[str]) -> str:
    """What this rank is told, with the plugin of its own folder."""
    from megadit.parallel import start_processes
    from megadit.parallel.consistency_check import check_consistency

    context = start_processes()
    sys.path.insert(0, folders[context.rank])
    load_plugins(["other_plugin"])
    try:
        check_consistency(context, {})
    except UserError as error:
        return str(error)
    return ""


def test_ranks_with_different_plugins_are_refused(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write_plugin(tmp_path / name, f"X = {value}\ndef register():\n    pass\n", "other_plugin")
    with plugins_taken_back():
        messages = set(run_ranks(2, agreed, [str(tmp_path / "a"), str(tmp_path / "b")]))
        alike = set(run_ranks(2, agreed, [str(tmp_path / "a"), str(tmp_path / "a")]))
    assert alike == {""}
    (message,) = messages
    assert message.startswith("ranks differ: plugin other_plugin is other_plugin (sha256 ") and "on rank 1" in message


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_on_two_local_workers(tmp_path: Path) -> None:
    file = write_study(tmp_path, plugins=["toy"])
    words = [sys.executable, "launch/sweep.py", "run", "--config", str(file), "--study_dir", str(tmp_path / "study")]
    done = run_command([*words, "--workers", "2"], env={"PYTHONPATH": str(HOME)}, timeout=400)
    assert done.returncode == 0, done.stderr
    trials = sorted((tmp_path / "study" / "trials").iterdir())
    assert len(trials) == 2
    for trial in trials:
        assert rows(trial)[-1]["steps_left"] == 0
        assert json.loads((trial / "environment.json").read_text())["plugins"][0]["name"] == "toy"
    assert yaml.safe_load((tmp_path / "study" / "study.yaml").read_text())["plugins"][0]["version"] == "1.0"
