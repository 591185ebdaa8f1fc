"""Checks of the machine: Python, cores, memory, disk, compiler, GPUs, and each kernel backend by one tiny call."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megadit.doctor.report import Check, State, failure_line, quiet
from megadit.extensions import FUSED_OPS

ROOT = Path(__file__).resolve().parents[2]
STALE_LOCK_S = 900.0  # DeepSpeed's ops take under six minutes to compile on two cores
GIB = 2.0**30


def check_machine() -> Iterator[Check]:
    """Python, cores, memory, disk, compiler and leftover build locks."""
    venv = ROOT / ".venv"
    detail = f"{platform.python_version()} at {sys.executable}"
    new_enough = sys.version_info >= (3, 11)
    remedy = "" if new_enough else "make setup PYTHON=python3.11, or a later one"
    if venv.is_dir() and not Path(sys.prefix).is_relative_to(venv):
        detail += f" (not {venv.name} of this checkout, which make uses)"
    yield Check("machine", "python", "ok" if new_enough else "broken", detail, remedy, needed=True)
    yield Check("machine", "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("machine", "cores", "ok", f"{cores} usable of {os.cpu_count()}")
    yield _memory()
    yield _disk(
        "disk", Path.cwd(), 2.0, "checkpoints and samples go here: free some space, or give --run_dir elsewhere"
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield _disk("shared memory", shm, 0.25, "data workers and NCCL need it; containers take --shm-size=8g")
    yield _compiler()
    numactl = shutil.which("numactl")
    remedy = "apt-get install numactl; only deepspeed --bind_cores_to_rank needs it"
    yield Check("machine", "numactl", "ok" if numactl else "missing", numactl or "not installed", remedy)
    yield _extension_locks()


def _memory() -> Check:
    """Free memory of the machine, or of the control group where that has less."""
    remedy = "a rank of the quickstart takes about 1 GiB: end other programs"
    try:
        import psutil
    except ImportError:  # before ``make setup``
        return Check("machine", "memory", "ok", "unknown without psutil", remedy)
    memory = psutil.virtual_memory()
    free, total = float(memory.available), float(memory.total)
    with contextlib.suppress(OSError, ValueError):
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))  # "max" means none: ValueError
        used = float(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        if limit < total:
            free, total = min(free, limit - used), limit
    state: State = "ok" if free > 2 * GIB else "broken"
    return Check("machine", "memory", state, f"{free / GIB:.1f} GiB free of {total / GIB:.1f}", remedy)


def _disk(name: str, path: Path, least_gib: float, remedy: str) -> Check:
    usage = shutil.disk_usage(path)
    state: State = "ok" if usage.free >= least_gib * GIB else "broken"
    return Check(
        "machine", name, state, f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} at {path}", remedy
    )


def _compiler() -> Check:
    """A C++ compiler that compiles a test program, and ninja."""
    needed_by = "only DeepSpeed's own CPU and fused optimizers need it"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    remedy = "apt-get install g++; pip install ninja"
    if not compiler:
        return Check("machine", "C++ compiler", "missing", needed_by, remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text(
            "#include <vector>\nint main() { return int(std::vector<int>(0).size()); }\n", encoding="utf-8"
        )
        try:
            command = [compiler, str(source), "-o", str(source.with_suffix(""))]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return Check("machine", "C++ compiler", "broken", f"{compiler}: {failure_line(error)}", remedy)
    search_path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    if shutil.which("ninja", path=os.pathsep.join(search_path)) is None:
        return Check("machine", "C++ compiler", "missing", f"{compiler} without ninja", remedy)
    return Check("machine", "C++ compiler", "ok", str(compiler))


def _extension_locks() -> Check:
    """Locks of C++ builds that were killed: the next build of the same op would wait for them without end."""
    # Where torch builds C++ extensions, DeepSpeed's ops among them.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    now = time.time()
    locks: list[tuple[Path, float]] = []
    for pattern in ("*/lock", "*/*/lock"):
        for path in root.glob(pattern):
            with contextlib.suppress(OSError):
                locks.append((path, now - path.stat().st_mtime))
    stale = [str(path) for path, age in locks if age > STALE_LOCK_S]
    if stale:
        detail = f"{len(stale)} left by a build that was killed; DeepSpeed would wait for it without end"
        return Check("machine", "build locks", "broken", detail, f"rm {' '.join(stale)}")
    return Check("machine", "build locks", "ok", f"{len(locks)} build(s) in progress" if locks else "none")


def check_backends() -> Iterator[Check]:
    """Devices, and each kernel backend by one tiny call."""
    yield from _nvidia()
    try:
        from megadit_kernels.backends import backend, backend_names
    except Exception as error:  # the package itself imports torch
        yield Check("backends", "kernels", "broken", failure_line(error), "make setup", needed=True)
        return
    for name in backend_names():
        with quiet():
            probe = backend(name)
        yield Check("backends", name, probe.state, probe.detail, probe.remedy)
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
        command = [program, *query]
        done = subprocess.run(command, check=True, capture_output=True, timeout=30, encoding="utf-8", errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        yield Check(
            "backends", "NVIDIA driver", "broken", f"nvidia-smi: {failure_line(error)}", "reload or update the driver"
        )
        return
    for number, line in enumerate(done.stdout.strip().splitlines()):
        model, total, free, driver = (part.strip() for part in line.rsplit(",", 3))
        yield Check("backends", f"GPU {number}", "ok", f"{model}, {free} free of {total}, driver {driver}")
    with contextlib.suppress(Exception):
        import torch

        if torch.version.cuda is None:
            remedy = "install a CUDA build of torch (pytorch.org), then make setup"
            yield Check("backends", "torch on GPU", "broken", "there is a GPU, but torch is a CPU build", remedy)
