"""The whole way by the real commands: images to tars, a codec, latents, training, pictures; and what is refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.ranks import run_command
from megadit.errors import UserError

SMALL = [
    *("model.width=32", "model.depth=1", "model.heads=2", "model.base_width=32", "model.in_channels=3"),
    *("model.input_size=4", "model.patch_size=1", "train.steps=5", "train.global_batch=8", "train.tensorboard=false"),
    *("train.validation_images=8", "sample.count=4", "sample.steps=2", "optim.warmup_steps=1"),
]


def command(*arguments: object, code: int = 0, **env: str) -> str:
    done = run_command([sys.executable, *map(str, arguments)], env={"OMP_NUM_THREADS": "1", **env})
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars of digits, a codec fitted on them, and tars of its latents."""
    root = tmp_path_factory.mktemp("shards")
    report = json.loads(
        command("tools/make_shards.py", "--out", root / "tars", "--samples", 600, "--json", "data.name=digits")
    )
    assert (report["samples"], report["shards"], report["classes"]) == (1797, 3, 10)
    source = ["data.name=webdataset", f"data.path={root / 'tars'}"]
    fit = ["tools/encode.py", "fit-pca", "--out", root / "codec", "--factor", 2, "--channels", 3, "--json"]
    report = json.loads(command(*fit, *source))
    assert report["psnr"] > 15 and report["held_out"] > 50
    vae = [f"data.vae.path={root / 'codec'}", "data.vae.factor=2"]
    report = json.loads(command("tools/encode.py", "--out", root / "latents", "--json", *source, *vae))
    assert report["samples"] == 1797 and report["holds"][0].startswith("latents, 3x4x4, scale ")
    return root


def train(root: Path, run: str, *more: str, code: int = 0) -> str:
    where = ["data.name=webdataset", f"data.path={root / 'latents'}"]
    base = ["launch/pretrain.py", "--config", "quickstart/digits.yaml", "--run_dir", root / run]
    return command(*base, *where, *SMALL, *more, code=code)


@pytest.mark.timeout(300)
def test_from_images_to_pictures_by_way_of_stored_latents(latents: Path) -> None:
    vae = (f"data.vae.path={latents / 'codec'}", "data.vae.factor=2")
    train(latents, "whole", *vae)
    with Image.open(latents / "whole" / "samples" / "step-00000005.png") as grid:
        assert min(grid.size) >= 16
    train(latents, "bare")  # without the codec: no pictures now ...
    assert not list((latents / "bare" / "samples").iterdir())
    rows = [(latents / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "bare")]
    assert [json.loads(a)["loss"] for a in rows[0]] == [json.loads(b)["loss"] for b in rows[1]]
    # ... but later, and the same ones
    command("launch/sample.py", latents / "bare", "--count", 4, "--device", "cpu", "--vae", latents / "codec")
    drawn = (latents / "bare" / "samples" / "sample.png").read_bytes()
    assert drawn == (latents / "whole" / "samples" / "step-00000005.png").read_bytes()


def refused(command: str, *arguments: object) -> str:
    """What the command says of these arguments, in this process."""
    module = importlib.import_module(f"megadit.cli.{command}")
    with pytest.raises(UserError) as caught:
        module.main([str(argument) for argument in arguments])
    return str(caught.value)


def test_what_does_not_fit_or_is_not_whole_is_refused(latents: Path, tmp_path: Path) -> None:
    said = train(latents, "no", "model.in_channels=4", code=2)
    assert said.startswith("error: model.in_channels: 4, but the stored latents of digits have 3 channels")
    assert not (latents / "no").exists()
    shutil.copytree(latents / "latents", tmp_path / "latents")
    shard = tmp_path / "latents" / "latents-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    vae = ["data.vae.path=x", "data.name=webdataset", f"data.path={tmp_path / 'latents'}"]
    assert f"data.path: {shard} has " in refused("encode", "--out", tmp_path / "x", *vae)
    assert "holds latents already" in refused(
        "encode", "--out", tmp_path / "x", "data.name=webdataset", f"data.path={latents / 'latents'}"
    )
    assert "holds a finished set" in refused("make_shards", "--out", latents / "tars", "data.name=digits")
    for command, arguments, sentence in (
        ("make_shards", ["optim.lr=1"], "only data.* keys are read"),
        ("make_shards", ["--samples", 0], "--samples: 0 is not at least 1"),
        ("make_shards", ["--max_mb", 0], "--max_mb: 0 is not above 0"),
        ("make_shards", ["--quality", 101], "--quality: 101 is not from 1 to 100"),
        ("make_shards", ["--name", "a/b"], "--name: 'a/b' cannot begin"),
        ("make_shards", ["data.nam=digits"], "did you mean data.name?"),
        ("encode", ["data.name=digits"], "there is nothing to encode"),
        ("encode", ["data.name=digits", "--device", "tpu"], "--device: tpu is not one of"),
    ):
        assert sentence in refused(command, "--out", tmp_path / "x", *arguments)
    fit = ("encode", "fit-pca", "--out", tmp_path / "x", "data.name=digits")
    assert "does not divide" in refused(*fit, "--factor", 3)
    assert "--images: 0 is not at least 1" in refused(*fit, "--images", 0)
    assert not (tmp_path / "x").exists()
