"""Bad input to launch/pretrain.py: one clear sentence, exit code 2, nothing written."""

import importlib.util
import json
import sys

import pytest
import torch
from PIL import Image

from helpers.ranks import ROOT, run_command
from megadit.cli import pretrain
from megadit.errors import run_command as run_main

DIGITS = ["--config", str(ROOT / "configs/quickstart/digits.yaml")]


@pytest.fixture
def main():
    return pretrain.main


@pytest.fixture
def refused(main, tmp_path, monkeypatch, capsys):
    """Run the command in a folder of its own; it must exit with 2, say one sentence and write nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, world=1):
        if world > 1:
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("MASTER_PORT", "1")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            run_main(main, [*DIGITS, *map(str, arguments)])
        text = capsys.readouterr().err
        assert stopped.value.code == 2, text
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        said = [line for line in text.splitlines() if line.strip()]
        assert len(said) == 1 and said[0].startswith("error: "), text
        return said[0]

    return run


def ds_file(folder, **content):
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1", "optim.learning_rate"),
        ("trian.steps=3", "did you mean train"),
        ("train.steps=many", "train.steps"),
        ("model.width=64.5", "model.width"),
        ("model.head_dim=24", "model.head_dim: 24 does not divide width 64"),
        ("model.base_width=null", "base_width"),
        ("model.num_classes=7", "model.num_classes"),
        ("model.input_size=16", "model.input_size"),
        ("data.name=image-folder", "data.path"),
        ("optim.schedule=cosine optim.warmup_steps=300", "optim.warmup_steps"),
        ("objective.label_dropout=0", "sample.guidance"),
        ("sample.scheduler=ddpm", "sample.scheduler"),
        ("objective.kind=ddpm sample.steps=2000", "sample.steps: 2000"),
    ],
)
def test_config_and_data_that_cannot_work(refused, override, said):
    assert said in refused(*override.split(), "--dry_run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU cannot do")
@pytest.mark.parametrize(
    "override",
    [
        "train.precision=fp16",
        "optim.implementation=deepspeed-fused",
        "optim.implementation=fused",
        "optim.implementation=apex",
    ],
)
def test_what_this_machine_cannot_do(refused, main, override, capsys):
    key = override.split("=")[0]
    assert key in refused(override)
    assert main([*DIGITS, override, "--dry_run"]) == 0  # which may well run elsewhere than the training
    assert key in capsys.readouterr().err


def test_packages_that_are_not_there(refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    assert "train.wandb" in refused("train.wandb=true")


def test_widths_that_heads_do_not_divide(refused):
    assert "heads: 5 does not divide width 64" in refused("model.head_dim=null", "model.heads=5", "--dry_run")


@pytest.mark.parametrize("arguments", [("train.global_batch=30",), ("train.micro_batch=5",)])
def test_batches_that_the_layout_does_not_divide(refused, arguments):
    said = refused(*arguments, "--dry_run", world=4)
    assert "batch" in said and "4" in said


def test_missing_data_and_broken_images(refused, tmp_path):
    folder = tmp_path / "pictures/cat"
    arguments = ["data.name=image-folder", f"data.path={folder.parent}", "data.image_size=8", "model.num_classes=1"]
    arguments += ["model.in_channels=3", "data.val_fraction=0", "--dry_run"]
    assert "data.path" in refused(*arguments)
    folder.mkdir(parents=True)
    assert "pictures" in refused(*arguments)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    assert "b.png" in refused(*arguments)
    latents = ["data.image_size=64", "data.vae.path=nowhere", "model.in_channels=4"]
    assert "data.vae.path: nowhere is not a folder" in refused(*arguments, *latents)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    assert "b.png" in refused(*arguments)


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        ({"train_batch_size": 64}, ["train.global_batch=32"], "contradicts train_batch_size: 64"),
        ({"scheduler": {"type": "OneCycle", "params": {}}}, [], "OneCycle"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001}}}, [], "warmup_max_lr"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, [], "WarmupDecayLR"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["optim.lr=1e-3"], "contradicts"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, [], "stage"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, [], "Lamb"),
        ({"bf16": {"enabled": True, "speed": 1}}, [], "speed: 1 (DeepSpeedBF16Config: Extra inputs"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, [], 'reduce_bucket_size: "big"'),
        ({"communication_data_type": "fp99"}, [], "fp99"),
    ],
)
def test_ds_configs_that_contradict_or_break_mup(refused, tmp_path, content, overrides, said):
    assert said in refused("--ds_config", ds_file(tmp_path, **content), *overrides, "--dry_run")


def test_files_that_are_not_there_or_not_json(refused, tmp_path):
    assert "nowhere.json" in refused("--ds_config", "nowhere.json", "--dry_run")
    (tmp_path / "ds.json").write_text("{")
    assert "ds.json" in refused("--ds_config", tmp_path / "ds.json", "--dry_run")
    assert "nowhere.yaml" in refused("--config", "nowhere.yaml", "--dry_run")


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_run_directories_that_are_none(refused, tmp_path, dry):
    (tmp_path / "file").write_text("")
    (tmp_path / "scratch").symlink_to(tmp_path / "cleaned")
    for folder, said in {
        "scratch": f"(it is a link to '{tmp_path}/cleaned', which is not there)",
        "file": "(it is a file, not a folder)",
        "file/run": "('file' is a file, not a folder)",
        "n" * 256: "is longer than a name's 255 bytes",
    }.items():
        assert said in refused("--run_dir", folder, *dry)


@pytest.mark.distributed
@pytest.mark.timeout(600)  # several whole commands, one after the other
def test_run_directories_that_cannot_be_used(tmp_path):
    small = ["model.width=32", "model.depth=1", "train.steps=1", "train.tensorboard=false", "sample.count=1"]
    command = [sys.executable, "launch/pretrain.py", *DIGITS, *small, "train.validation_images=0"]

    def said(*arguments):
        done = run_command([*command, *map(str, arguments)])
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]

    (tmp_path / "file").write_text("")
    assert "cannot be written" in said("--run_dir", tmp_path / "file/run")
    assert "cannot be written" in said("--run_dir", "/proc")  # is there, and takes no file
    (tmp_path / "pictures/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/cat/a.png")
    (tmp_path / "pictures/cat/b.png").write_bytes(b"")
    pictures = ["data.name=image-folder", f"data.path={tmp_path / 'pictures'}", "data.image_size=8"]
    pictures += ["model.num_classes=1", "model.in_channels=3", "data.val_fraction=0", "train.global_batch=1"]
    assert "b.png" in said("--run_dir", tmp_path / "other", *pictures)
    assert run_command([*command, "--run_dir", str(tmp_path / "run")]).returncode == 0
    ended = tmp_path / "run/exit.json"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p != ended}
    assert json.loads(ended.read_text())["code"] == 0
    assert "model.depth 1 → 2" in said("--run_dir", tmp_path / "run", "model.depth=2", "train.steps=2")
    assert "model.depth 1 → 2" in said("--run_dir", tmp_path / "run", "model.depth=2", "--dry_run")
    assert "--resume: never" in said("--run_dir", tmp_path / "run", "--resume", "never")
    assert "is no checkpoint" in said("--run_dir", tmp_path / "other", "--resume", tmp_path / "file")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p != ended} == before
    record = json.loads(ended.read_text())  # tells of the last start, which was refused, and not of the one before
    assert (record["code"], record["step"]) == (2, 1) and "--resume: never" in record["reason"]
    assert not (tmp_path / "other").exists()
