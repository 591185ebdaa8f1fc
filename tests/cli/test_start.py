"""What a command imports and when: nothing heavy to refuse, no DeepSpeed for a dry run, diffusers to draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_command

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "configs/quickstart/digits.yaml")

# Commands and bad input of every kind that can be judged without a tensor. NOWHERE and EMPTY are filled in.
REFUSED = [
    ["launch/pretrain.py", "nosuch.key=1"],
    ["launch/pretrain.py", "optim.lr=x"],
    ["launch/pretrain.py", "--config", "NOWHERE.yaml"],
    ["launch/pretrain.py", "--ds_config", "NOWHERE.json"],
    ["launch/pretrain.py", "--frobnicate"],
    ["launch/pretrain.py", "--json"],
    ["launch/pretrain.py", "--dry_run", "--world_size", "0"],
    ["launch/pretrain.py", "--resume", "NOWHERE"],
    ["launch/pretrain.py", "train.init_from=NOWHERE"],
    ["launch/pretrain.py", "parallel.tensor=3"],
    ["launch/pretrain.py", "train.micro_batch=7"],
    ["launch/pretrain.py", "sample.guidance=2", "objective.label_dropout=0"],
    ["launch/pretrain.py", "objective.kind=ddpm", "sample.scheduler=ddim", "sample.steps=5000"],
    ["launch/pretrain.py", "data.name=image-folder", "data.path=NOWHERE"],
    ["launch/pretrain.py", "data.name=webdataset", "data.path=EMPTY"],
    ["launch/pretrain.py", "data.name=fashion-mnist", "data.path=NOWHERE"],
    ["launch/pretrain.py", "--config", DIGITS, "data.vae.path=NOWHERE", "data.vae.factor=1"],
    ["RANK=x", "WORLD_SIZE=2", "launch/pretrain.py"],
    ["RANK=0", "WORLD_SIZE=2", "launch/pretrain.py"],
    ["OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE=2", "launch/pretrain.py"],
    ["RANK=", "launch/sweep.py", "worker", "--config", "dit-width-mini"],
    ["launch/sample.py", "NOWHERE"],
    ["launch/sample.py", "EMPTY"],
    ["launch/sweep.py", "run", "--config", "NOWHERE"],
    ["launch/sweep.py", "run", "--config", "dit-width-mini", "--workers", "0"],
    ["launch/sweep.py", "status", "--study_dir", "EMPTY"],
    ["launch/sweep.py", "report", "--study_dir", "NOWHERE"],
    ["launch/sweep.py", "worker", "--study_dir", "EMPTY"],
    ["tools/mup_table.py", "nosuch.key=1"],
    ["tools/base_shapes.py", "--out", "x.bsh", "--config", "NOWHERE"],
    ["tools/coord_check.py", "--out", "x", "--widths", "64"],
    ["tools/coord_check.py", "--out", "x", "nosuch.key=1"],
    ["tools/evaluate.py", "emoji-clip", "NOWHERE.npz", "--prompts", DIGITS],
    ["tools/encode.py", "--out", "x", "data.name=image-folder", "data.path=NOWHERE"],
    ["tools/encode.py", "--out", "x", "data.vae.path=EMPTY"],
    ["tools/encode.py", "fit-pca", "--out", "x", "--images", "0"],
    ["tools/make_shards.py", "--out", "x", "data.name=image-folder", "data.path=NOWHERE"],
    ["tools/make_shards.py", "--out", "x", "--samples", "0"],
    ["tools/convert_checkpoint.py", "--from", "official-dit", "--to", "megadit", "NOWHERE", "x"],
    ["tools/convert_checkpoint.py", "--from", "megadit", "--to", "safetensors", "EMPTY", DIGITS],
    ["tools/inspect_checkpoint.py", "NOWHERE"],
    ["tools/compare_runs.py", "NOWHERE", "EMPTY"],
    ["tools/transfer.py", "verify", "NOWHERE"],
    ["tools/transfer.py", "apply", "NOWHERE", "--target", "NOWHERE"],
]

# Refuses to import torch, and asks every command; prints the exit code (or what was raised) and last words of each.
REFUSALS = """
import contextlib, importlib.abc, io, json, os, runpy, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "deepspeed", "diffusers", "transformers", "matplotlib", "scipy"):
            raise AssertionError(f"imports {name}")

sys.meta_path.insert(0, NoTorch())
answers = []
environment = dict(os.environ)
for words in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(environment)
    while not words[0].endswith(".py"):
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    sys.argv = words
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            runpy.run_path(words[0], run_name="__main__")
            code = "it did not exit"
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    answers.append([code, stderr.getvalue()])
print(json.dumps(answers))
"""

# One process: a dry run, then a training. When a library is first imported it notes how far the run is.
STAGES = """
import contextlib, importlib.abc, io, json, runpy, sys
from pathlib import Path

run = Path(sys.argv[1])
WATCHED = ("deepspeed", "diffusers", "transformers", "matplotlib", "scipy", "sklearn", "optuna", "pandas", "sympy",
           "torch._dynamo")
first = {}

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in WATCHED and not looking():
            saved = (run / "checkpoints" / "latest").exists()
            first.setdefault(name, "after the checkpoint" if saved else "before the checkpoint")

def looking():  # diffusers asks what is installed, by find_spec
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "find_spec" and "importlib.util" in frame.f_globals["__name__"]:
            return True
        frame = frame.f_back
    return False

sys.meta_path.insert(0, Watch())
ends = []
common = ["launch/pretrain.py", "--config", sys.argv[2], "--run_dir", str(run), "train.steps=1", "sample.count=2"]
for extra in (["--dry_run"], ["train.tensorboard=false"]):
    sys.argv = [*common, *extra]
    try:
        with contextlib.redirect_stdout(io.StringIO()) if extra == ["--dry_run"] else contextlib.nullcontext():
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        ends.append(end.code)
    if extra == ["--dry_run"]:
        dry = sorted(name for name in WATCHED if name in sys.modules)
(run / "told.json").write_text(json.dumps([ends, dry, first]), encoding="utf-8")
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "empty").mkdir()
    paths = {"NOWHERE": str(folder / "nowhere"), "EMPTY": str(folder / "empty")}

    def placed(word: str) -> str:
        for name, path in paths.items():
            word = word.replace(name, path)
        return str(ROOT / word) if word.endswith(".py") else word

    words = [[placed(word) for word in command] for command in REFUSED]
    result = run_command([sys.executable, "-c", REFUSALS, json.dumps(words)], timeout=200, cwd=folder)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    refusals = {" ".join(command): answer for command, answer in zip(REFUSED, answers, strict=True)}
    return {**refusals, "left": sorted(path.name for path in folder.iterdir())}


def test_bad_input_is_refused_before_torch_is_imported(refusals):
    accepted = {command: answer for command, answer in refusals.items() if command != "left" and answer[0] != 2}
    assert accepted == {}


def test_refusals_are_sentences_and_leave_nothing(refusals):
    for command, answer in refusals.items():
        if command != "left":
            assert "error: " in answer[1] and "Traceback" not in answer[1], command
    assert refusals["left"] == ["empty"]


def test_libraries_are_imported_when_they_are_used(tmp_path):
    """Also: a run whose output is ASCII, on a full disk, has trained all the same, and ends with 0."""
    run = tmp_path / "run"
    run.mkdir()
    words = ["sh", "-c", 'exec "$0" "$@" > /dev/full', sys.executable, "-c", STAGES, str(run), DIGITS]
    result = run_command(words, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, timeout=200)
    assert result.returncode == 0, result.stderr
    ends, dry, first = json.loads((run / "told.json").read_text(encoding="utf-8"))
    assert ends == [0, 0], result.stderr
    assert set(dry) <= {"sympy"}  # of torch's own meta device
    assert first.get("deepspeed") == "before the checkpoint"
    late = {name for name, when in first.items() if when == "after the checkpoint"}
    assert {"diffusers", "matplotlib"} <= late
    assert set(first) - late <= {"deepspeed", "sympy"}
    assert not {"transformers", "scipy", "optuna", "pandas", "torch._dynamo"} & set(first)
