"""launch/sample.py: what it writes, that it repeats itself, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.cli import sample
from megadit.config import save_config
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from megadit.errors import UserError
from megadit.models import build_model
from megadit.rng import normal, stream_key


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run of a small untrained DiT of three classes, whose outputs depend on everything (nothing is left at zero)."""
    config = RunConfig(
        model=ModelConfig(width=16, heads=1, depth=1, in_channels=1, input_size=8, num_classes=3),
        objective=ObjectiveConfig(),
        train=TrainConfig(steps=1),
        sample=SampleConfig(count=6, steps=3),
    )
    model = build_model(config.model)
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * normal(stream_key(0, name), parameter.shape)
    monkeypatch.setattr("megadit.checkpoint.find.load_model", lambda *_, **__: (config, model))
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "classes.json").write_text('["red", "green", "blue"]')
    return tmp_path


def command(run_dir, capsys, *arguments: str) -> dict:
    assert sample.main([str(run_dir), *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_command_gives_the_same_pixels(run_dir, capsys):
    first = command(run_dir, capsys, "--guidance", "3", "--npz", str(run_dir / "a.npz"))
    assert first["grid"] == str(run_dir / "samples" / "sample.png")
    before = Path(first["grid"]).read_bytes()
    second = command(run_dir, capsys, "--guidance", "3", "--npz", str(run_dir / "b.npz"))
    assert Path(second["grid"]).read_bytes() == before
    assert (run_dir / "a.npz").read_bytes() == (run_dir / "b.npz").read_bytes()
    other = command(run_dir, capsys, "--guidance", "3", "--seed", "1", "--out", str(run_dir / "other.png"))
    assert Path(other["grid"]).read_bytes() != before


def test_the_last_lines_say_where_the_pictures_are(run_dir, capsys):
    words = [str(run_dir), "--steps", "2", "--count", "2", "--device", "cpu"]
    assert sample.main(words) == 0
    assert capsys.readouterr().out == f"2 pictures: {run_dir / 'samples' / 'sample.png'}\n"
    assert sample.main([*words, "--npz", str(run_dir / "a.npz")]) == 0
    assert capsys.readouterr().out.endswith(f"sample.png\nas arrays: {run_dir / 'a.npz'}\n")


def test_settings_and_classes_reach_the_samples(run_dir, capsys):
    summary = command(
        run_dir, capsys, "--classes", "blue,0", "--count", "5", "--steps", "2", "--scheduler", "ddim",
        "--npz", str(run_dir / "all.npz"),
    )  # fmt: skip
    assert summary["labels"] == [2, 0, 2, 0, 2]
    assert (summary["count"], summary["steps"], summary["scheduler"], summary["guidance"]) == (5, 2, "ddim", 1.0)
    with np.load(run_dir / "all.npz", allow_pickle=False) as images:
        assert images["arr_0"].shape == (5, 8, 8, 3)
    with Image.open(summary["grid"]) as sheet:
        assert sheet.format == "PNG"


def test_batches_do_not_change_the_pictures(run_dir, capsys):
    for size in ("2", "6"):
        command(run_dir, capsys, "--batch", size, "--npz", str(run_dir / f"{size}.npz"))
    with np.load(run_dir / "2.npz") as small, np.load(run_dir / "6.npz") as large:
        difference = small["arr_0"].astype(int) - large["arr_0"]
    assert np.abs(difference).max() <= 1


def test_auto_is_told_as_what_it_was(run_dir, capsys):
    assert command(run_dir, capsys)["scheduler"] == "dpm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], r"--steps: 0 is not at least 1"),
        (["--guidance", "-1"], r"--guidance: -1"),
        (["--batch", "0"], r"--batch: 0"),
        (["--classes", "purple"], r"--classes: purple"),
        (["--scheduler", "euler"], r"sample\.scheduler: euler"),
        (["--guidance", "2", "--guidance_channels", "9"], r"sample\.guidance_channels: 9"),
        (["--device", "tpu"], r"--device: tpu"),
    ],
)
def test_bad_settings_are_refused_and_write_nothing(run_dir, arguments, message):
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(UserError, match=message):
        sample.main([str(run_dir), *arguments])
    assert sorted(run_dir.rglob("*")) == before


def test_bad_places_are_refused(run_dir):
    with pytest.raises(UserError, match="no such run directory"):
        sample.main([str(run_dir / "nowhere")])
    with pytest.raises(UserError, match=r"--checkpoint: .*is not a folder"):
        sample.main([str(run_dir), "--checkpoint", str(run_dir / "step-1")])
    with pytest.raises(UserError, match="is a folder"):
        sample.main([str(run_dir), "--out", str(run_dir)])
    with pytest.raises(UserError, match="not a folder that can be written"):
        sample.main([str(run_dir), "--out", str(run_dir / "classes.json" / "a.png")])


def test_files_of_the_run_are_not_replaced_by_pictures(run_dir):
    config = run_dir / "config.yaml"
    before = config.read_bytes()
    for option, what in (("--out", "PNG picture"), ("--npz", "file of pictures")):
        with pytest.raises(UserError, match=rf"^{option}: '.*config\.yaml' is no {what} and would be replaced; choose"):
            sample.main([str(run_dir), option, str(config)])
    with pytest.raises(UserError, match=r"^--npz: '.*a\.png' is where --out writes the grid"):
        sample.main([str(run_dir), "--out", str(run_dir / "a.png"), "--npz", str(run_dir / "a.png")])
    assert config.read_bytes() == before
