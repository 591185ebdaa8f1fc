"""The JSON schema and the reference table: valid, in step with the loader, and up to date in the docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadit.config.loading.sources import configs_dir
from megadit.config.schema.json_schema import file_schema, reference
from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import all_keys

ROOT = Path(__file__).resolve().parents[2]


RUNS = [path for path in sorted(configs_dir().rglob("*.yaml")) if path.parent.name != "sweeps"]  # the rest are studies


def problems(value: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft202012Validator(file_schema()).iter_errors(value)]


def test_it_is_a_valid_schema():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(file_schema())


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_our_files_fit(path: Path):
    assert problems(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lr: 2^-10, betas: [0.9, 95e-2]}",
        "optim: {lr: 1e-4}",
        "base: [a.yaml, b.yaml]",
        "model: {preset: dit-xl-2-mup, width: 576}",
        "data: {vae: null}",
        "train: {steps: 2^9}",
    ],
)
def test_what_the_loader_reads_fits(text: str):
    assert problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lr: fast}",
        "optim: {lr: -1}",
        "optim: {lrr: 1}",
        "optm: {}",
        "base: 3",
        "model: {preset: dit-xxl}",
        "train: {precision: fp4}",
        "data: {flip: 1}",
        "parallel: {zero_stage: 4}",
    ],
)
def test_what_the_loader_refuses_does_not(text: str):
    assert problems(yaml.safe_load(text)) != []


def run_tool(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "config_schema.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool(tmp_path: Path):
    assert json.loads(run_tool().stdout) == json.loads(json.dumps(file_schema()))
    written = run_tool("--out", str(tmp_path / "s.json"))
    assert written.returncode == 0 and written.stdout == f"{tmp_path / 's.json'}: JSON schema of configuration files\n"
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(run_tool().stdout)
    bad = run_tool("--out", str(tmp_path / "none" / "s.json"))
    assert bad.returncode == 2 and bad.stderr.startswith("error: --out: ") and bad.stderr.count("\n") == 1
    (tmp_path / "doc.md").write_text("no marks")
    bad = run_tool("--docs", str(tmp_path / "doc.md"))
    assert bad.returncode == 2 and "has no reference marks" in bad.stderr
    assert (tmp_path / "doc.md").read_text() == "no marks"


def test_the_docs_are_up_to_date(tmp_path: Path):
    copy = tmp_path / "config.md"
    copy.write_text((ROOT / "docs" / "config.md").read_text())
    renewed = run_tool("--docs", str(copy))
    assert renewed.returncode == 0 and renewed.stdout == f"{copy}: reference tables renewed\n"
    assert "beside --docs" in run_tool("--docs", str(copy), "--out", str(tmp_path / "s.json")).stderr
    message = "run: python tools/config_schema.py --docs docs/config.md"
    assert copy.read_text() == (ROOT / "docs" / "config.md").read_text(), message


def test_every_key_is_documented():
    text = reference()
    for key in all_keys(RunConfig):
        leaf = key.rpartition(".")[2]
        assert f"`{leaf}`" in text or leaf in text.replace(",", " "), key
    assert "PydanticUndefined" not in text and "typing." not in text
    meanings = [line.split("|")[-2].strip() for line in text.split("\n") if line.startswith("| `")]
    assert all(meanings)
