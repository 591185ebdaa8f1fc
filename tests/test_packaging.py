"""Packaging: what is installed is what the code imports, at versions that fit, and nothing is installed twice."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import megadit
from helpers.ranks import run_command

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("megadit", "kernels", "launch", "tools")
# Imported only where somebody installed them: the extras' packages, and what comes with a CUDA build of torch.
OPTIONAL = {
    "triton",
    "transformer_engine",
    "flash_attn",
    "flash_attn_interface",
    "apex",
    "amp_C",
    "wandb",
    "torchvision",
}
COMES_WITH = {"pydantic_core": "pydantic", "botocore": "boto3"}  # parts of a required package with names of their own

# Required, though no module of megadit imports it by its name: why.
NOT_IMPORTED = {
    "tensorboard": "torch.utils.tensorboard imports it and does not require it",
    "webdataset": "the doctor reports on it, for sharded data",
    "boto3": "the doctor reports on it, for data on S3",
}
IMPORTING = {"import_module", "_import_safely", "find_spec"}  # calls that are given the name of a module


@cache
def setup_facts() -> dict[str, Any]:
    """What setup.py hands to setuptools, without building anything."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def pins() -> dict[str, Version]:
    """constraints.txt as {name: version}; every line must be an exact pin."""
    pins_by_name = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins_by_name[canonicalize_name(requirement.name)] = Version(pin.version)
    return pins_by_name


def test_one_version():
    assert setup_facts()["version"] == megadit.__version__
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]" or headings[0].startswith(f"## [{megadit.__version__}]")


def test_every_package_is_packaged():
    packages = set(setup_facts()["packages"])
    for folder in (path.parent for path in (ROOT / "megadit").rglob("*.py")):
        assert ".".join(folder.relative_to(ROOT).parts) in packages, f"{folder} has no __init__.py"
    assert "megadit_kernels" in packages and setup_facts()["package_dir"]["megadit_kernels"].startswith("kernels")
    assert not any(name.split(".")[0] in ("tests", "tools", "launch", "benchmarks") for name in packages)


def test_a_build_holds_every_file(tmp_path):
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    result = run_command(command, timeout=100)
    assert result.returncode == 0, result.stderr
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    sources = [*source_files(ROOT / "megadit"), *source_files(ROOT / "kernels" / "megadit_kernels")]
    expected = {path.relative_to(ROOT).as_posix().removeprefix("kernels/") for path in sources}
    assert built == expected and "megadit/search/report/templates/report.html.j2" in built


def source_files(folder: Path) -> list[Path]:
    """Modules, and the data that belongs to a package: whatever lies there that Python did not make itself."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def third_party_imports() -> set[str]:
    names = set()
    for folder in PACKAGED:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names.add(node.module.split(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTING:
                    named = [part.value for part in node.args[:1] if isinstance(part, ast.Constant)]
                    names.update(str(name).split(".")[0] for name in named)
                elif isinstance(node, ast.Assign) and ast.unparse(node).startswith("PACKAGES = {"):
                    names.update(ast.literal_eval(node.value))  # modules that are imported in a loop, by their names
    return names - set(sys.stdlib_module_names) - {"megadit", "megadit_kernels"}


def test_whatever_is_imported_is_required():
    required = requirements(setup_facts()["install_requires"])
    owners = importlib.metadata.packages_distributions()
    for module in third_party_imports() - OPTIONAL:
        distributions = {canonicalize_name(name) for name in owners.get(module, [])} | {COMES_WITH.get(module, "")}
        assert distributions & set(required), f"import {module}: add its package to INSTALL in setup.py"


def test_whatever_is_required_is_imported():
    facts, owners = setup_facts(), importlib.metadata.packages_distributions()
    required = {*requirements(facts["install_requires"]), *requirements(facts["extras_require"]["tracking"])}
    imported = {canonicalize_name(name) for module in third_party_imports() for name in owners.get(module, [module])}
    unused = required - imported - set(NOT_IMPORTED)
    assert not unused, f"nothing imports {', '.join(sorted(unused))}: take them out of setup.py and constraints.txt"
    assert not NOT_IMPORTED.keys() & imported, "these are imported now: take them out of NOT_IMPORTED"
    assert NOT_IMPORTED.keys() <= required, "these are no requirements any more: take them out of NOT_IMPORTED"


def test_every_requirement_has_a_pin_that_fits():
    facts, pinned = setup_facts(), pins()
    for name, requirement in requirements([*facts["install_requires"], *facts["extras_require"]["dev"]]).items():
        assert name in pinned, f"{name} is required and not pinned"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes {pinned[name]}"


def test_pins_serve_cpu_and_cuda_machines():
    pinned = pins()
    assert pinned["torch"].local is None, "a build tag such as +cpu ties the file to one kind of machine"
    tied = [name for name in pinned if name == "triton" or name.startswith("nvidia")]
    assert not tied, "each CUDA build of torch requires its own exact ones"


def test_extras():
    extras = setup_facts()["extras_require"]
    assert {"dev", "te", "flash", "apex", "tracking"} <= set(extras)
    assert "apex" not in requirements(extras["apex"]), "the index's package apex is not NVIDIA's"
    assert not set(requirements(extras["te"])) & set(requirements(setup_facts()["install_requires"]))


def test_python_versions():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert setup_facts()["python_requires"] == ">=3.11"
    assert facts["tool"]["ruff"]["target-version"] == "py311" and facts["tool"]["mypy"]["python_version"] == "3.11"


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "9. Accepting Warranty or Additional Liability" in text


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that `make setup` depends on, with an environment that looks installed."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9))
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / ".venv" / ".megadit-installed").touch()
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(
        ["make", "-C", str(checkout), *arguments], env={"MAKEFLAGS": None, "MAKELEVEL": None}, timeout=30
    )


@needs_make
def test_setup_is_skipped_the_second_time(checkout):
    assert "Nothing to be done" in make(checkout, "setup").stdout
    planned = make(checkout, "-n", "train").stdout
    assert "pip" not in planned and "--config configs/quickstart/emoji.yaml --run_dir runs/quickstart-" in planned


@needs_make
@pytest.mark.parametrize("changed", ["setup.py", "pyproject.toml", "constraints.txt"])
def test_setup_runs_again_when_requirements_change(checkout, changed):
    os.utime(checkout / changed)
    os.utime(checkout / ".venv" / ".megadit-installed", (1.1e9, 1.1e9))
    planned = make(checkout, "-n", "setup").stdout
    torch_first, everything = planned.index("constraints.txt torch"), planned.index("-e '.[dev]'")
    assert torch_first < everything < planned.index("uninstall")


@needs_make
def test_an_old_python_is_refused_in_one_sentence(checkout):
    shutil.rmtree(checkout / ".venv")
    old = checkout / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(checkout, "setup", f"PYTHON={old}")
    assert result.returncode == 2 and "older than Python 3.11" in result.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_quick_tests_leave_out_slow_and_gpu(checkout):
    assert '-m "not slow and not gpu"' in make(checkout, "-n", "test").stdout
    assert "-m pytest -q" in make(checkout, "-n", "test-all").stdout
    lint = make(checkout, "-n", "lint").stdout
    assert "ruff check" in lint and "ruff format --check" in lint and "mypy" in lint


def test_ci_is_a_script_that_runs():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert run_command(["bash", "-n", str(path)], timeout=30).returncode == 0
    text = path.read_text()
    assert "set -euo pipefail" in text and "make lint" in text and "make test" in text
