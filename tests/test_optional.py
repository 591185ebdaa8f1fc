"""A torchvision that is installed but broken must not take diffusers down with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import sys
from megadit.optional import hide_broken_torchvision, import_diffusers
hidden = hide_broken_torchvision()
import importlib.util
print(hidden, importlib.util.find_spec("torchvision") is not None, "torchvision" in sys.modules)
diffusers = import_diffusers()
print(diffusers.DDPMScheduler.__name__, __import__("os").environ["HF_HUB_OFFLINE"])
"""


def run_with(folder: Path, script: str = CHECK) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), root])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.splitlines()


def fake_torchvision(folder: Path, body: str) -> Path:
    """A package of that name, with metadata as pip would leave it, found before any real one."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "ops.py").write_text("")
    (package / "__init__.py").write_text(body)
    info = folder / "torchvision-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    return folder


def test_a_broken_torchvision_is_hidden(tmp_path):
    failure = "from . import ops\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    assert run_with(fake_torchvision(tmp_path, failure)) == ["True False True", "DDPMScheduler 1"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [("raise OSError('no .so')\n", "True False True"), ("__version__ = '9.9'\n", "False True True")],
)
def test_only_a_broken_torchvision_is_hidden(tmp_path, body, expected):
    script = CHECK.partition("diffusers = import_diffusers()")[0]  # without diffusers' seconds of imports
    assert run_with(fake_torchvision(tmp_path, body), script) == [expected]
