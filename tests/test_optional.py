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


DEFERRED = """
import sys, torch
from megadit.optional import defer_compiler

def trained(steps, optimizer=None, weight=None):
    if optimizer is None:
        weight = torch.nn.Parameter(torch.arange(4.0))
        optimizer = torch.optim.AdamW([weight], lr=0.1, foreach=True)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        assert torch.is_grad_enabled()
        optimizer.step()
    return optimizer, weight

import torch.utils.checkpoint
defer_compiler()
defer_compiler()  # again, as by the next trial of a sweep's worker
optimizer, early = trained(2)
assert torch.nn.functional.gelu(torch.empty(2, 3, device="meta")).shape == (2, 3)
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
compiled = torch.compile(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False) + 1,
                         backend="eager", fullgraph=True)
assert torch.equal(compiled(early), torch.sin(early) + 1)
assert "torch._dynamo" in sys.modules
trained(2, optimizer, early)  # torch's own way from now on
_, late = trained(4)
assert torch.equal(early, late), (early, late)
assert not hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, "__dynamo_disable") or (
    "optional" not in torch.optim.Optimizer.zero_grad.__wrapped__.__dict__["__dynamo_disable"].__code__.co_filename
)
print("as it should be")
"""


def test_the_compiler_waits_until_something_is_compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DEFERRED], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "as it should be", done.stderr


def test_diffusers_leaves_no_trace_of_what_was_hidden():
    script = CHECK + (
        "diffusers.DPMSolverMultistepScheduler\n"
        "assert not {'torch._dynamo', 'scipy', 'sympy'} & set(sys.modules)\n"
        "import scipy.stats, sympy\nprint('scipy is still there')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["scipy is still there"], done.stderr
