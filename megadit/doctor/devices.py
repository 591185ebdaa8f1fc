"""GPUs, and each kernel backend by one tiny call."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator

from megadit.doctor.quiet import one_line, quiet
from megadit.doctor.report import Check
from megadit.extensions import FUSED_OPS


def check_backends() -> Iterator[Check]:
    """Devices, and each kernel backend by one tiny call."""
    yield from _nvidia()
    try:
        from megadit_kernels.backends import backend, backend_names
    except Exception as error:  # the package itself imports torch
        yield Check("backends", "kernels", "broken", one_line(error), "make setup", needed=True)
        return
    for name in backend_names():
        with quiet():
            found = backend(name)
        yield Check("backends", name, found.state, found.detail, found.remedy)
    device = "cuda" if backend("cuda").works else "cpu"
    for name in FUSED_OPS.names():
        yield Check("backends", name, "ok", f"{FUSED_OPS.get(name).backend_on(device)} on {device}")


def _nvidia() -> Iterator[Check]:
    """GPUs that the driver sees, with their memory, whatever torch thinks of them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check("backends", "NVIDIA driver", "missing", "no nvidia-smi: no NVIDIA GPU, or no driver")
        return
    query = ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            [program, *query],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Check(
            "backends", "NVIDIA driver", "broken", f"nvidia-smi: {one_line(error)}", "reload or update the driver"
        )
        return
    for number, line in enumerate(answer.stdout.strip().splitlines()):
        model, total, free, driver = (part.strip() for part in line.rsplit(",", 3))
        yield Check("backends", f"GPU {number}", "ok", f"{model}, {free} free of {total}, driver {driver}")
    with contextlib.suppress(Exception):
        import torch

        if torch.version.cuda is None:
            remedy = "install a CUDA build of torch, as its own site tells, then make setup"
            yield Check("backends", "torch on GPU", "broken", "there is a GPU, but torch is a CPU build", remedy)
