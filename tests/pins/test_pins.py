"""What users rely on goes on: run directories, checkpoints, a study, help texts, schema, presets and losses."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.help_texts import ask_all
from helpers.ranks import run_command
from helpers.scripts import import_script

HERE = Path(__file__).parent
LOSSES: dict[str, list[float]] = json.loads((HERE / "losses.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5  # relative, of losses on other CPUs and layouts
STEPS = 20
TRAINING = ("--dry_run", "coord_check")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return import_script(HERE / "make.py")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """A copy of a pinned folder, to be gone on with."""
    return lambda name: Path(shutil.copytree(HERE / name, tmp_path / "copy"))


def expect(losses: list[float], name: str) -> None:
    assert len(losses) == STEPS
    assert losses == pytest.approx(LOSSES[name], rel=TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "ranks", "overrides"),
    [
        ("zero1", 2, []),
        ("zero1", 1, []),
        ("tensor2-pipeline2", 1, ["parallel.tensor=1", "parallel.pipeline=1"]),
        ("tensor2-pipeline2", 4, []),
    ],
)
def test_a_run_directory_goes_on(make: Any, elsewhere: Any, run: str, ranks: int, overrides: list[str]) -> None:
    expect(make.resumed(elsewhere(f"run_dirs/{run}"), *overrides, ranks=ranks), run)


@pytest.mark.distributed
def test_a_run_directory_with_checkpoints_of_format_1_goes_on(make: Any, elsewhere: Any) -> None:
    expect(make.resumed(elsewhere("run_dirs/format1"), f"train.steps={STEPS}"), "zero1")


@pytest.mark.distributed
def test_every_family_trains_as_it_did(make: Any) -> None:
    losses = make.family_losses()
    for family, curve in losses.items():
        expect(curve, family)


def test_help_texts(make: Any) -> None:
    texts = {make.help_file(words): answer["text"] for words, answer in ask_all().items()}
    pinned = {file.name: file.read_text(encoding="utf-8") for file in (HERE / "help").iterdir()}
    assert texts.keys() == pinned.keys()
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse lays its texts out differently in other versions of Python")
    for name, text in pinned.items():
        assert texts[name] == text, name


def test_schema(make: Any) -> None:
    assert make.schema() == json.loads((HERE / "run.schema.json").read_text(encoding="utf-8"))


def test_mup_tables_of_all_presets(make: Any) -> None:
    tables = json.loads(json.dumps(make.mup_tables()))
    pinned = json.loads((HERE / "mup.json").read_text(encoding="utf-8"))
    assert tables.keys() == pinned.keys()
    for preset, rows in pinned.items():
        assert [row["name"] for row in tables[preset]] == [row["name"] for row in rows], preset
        for row, expected in zip(tables[preset], rows, strict=True):
            for key, value in expected.items():
                wanted = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
                assert row[key] == wanted, f"{preset}: {key} of {row['name']}"


def test_an_unfinished_study_is_read(elsewhere: Any) -> None:
    folder = elsewhere("studies/unfinished")
    done = run_command([sys.executable, "launch/sweep.py", "status", "--study_dir", str(folder), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["complete"] == 2


@pytest.mark.slow
def test_an_unfinished_study_is_finished(elsewhere: Any) -> None:
    folder = elsewhere("studies/unfinished")
    study_dir = ["--study_dir", str(folder)]
    done = run_command([sys.executable, "launch/sweep.py", "run", *study_dir, "--workers", "1"])
    assert done.returncode == 0, done.stderr
    status = run_command([sys.executable, "launch/sweep.py", "status", *study_dir, "--json"])
    assert json.loads(status.stdout)["counts"]["complete"] == 4


def exit_codes(*, training: bool) -> dict[str, int]:
    """The pinned codes of the commands that train something, or of the others."""
    pinned: dict[str, int] = json.loads((HERE / "exit_codes.json").read_text(encoding="utf-8"))
    return {line: code for line, code in pinned.items() if any(part in line for part in TRAINING) == training}


def test_exit_codes(make: Any) -> None:
    pinned = exit_codes(training=False)
    assert {0, 2, 3} <= set(pinned.values())
    assert make.exit_codes(pinned) == pinned


@pytest.mark.slow
def test_exit_codes_of_commands_that_train(make: Any) -> None:
    pinned = exit_codes(training=True)
    assert make.exit_codes(pinned) == pinned


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("megadit.config", "load_config preset RunConfig ModelConfig"),
        ("megadit.models", "build_model Conditioning"),
        ("megadit.convert", "from_official to_official from_diffusers to_diffusers"),
        ("megadit.mup", "ParamSpec param_specs"),
    ],
)
def test_programs_import_what_they_imported(module: str, names: str) -> None:
    package = importlib.import_module(module)
    for name in names.split():
        assert name in package.__all__
        assert callable(getattr(package, name))
