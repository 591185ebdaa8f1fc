"""The doctor: each failure it knows is planted and must be named, with its reason and what would help."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

import pytest

from helpers.ranks import run_command
from megadit.doctor import Check, MachineReport, format_report
from megadit.doctor import machine as machine_checks
from megadit.doctor import software as software_checks
from megadit.doctor import training as training_checks
from megadit.doctor.machine import check_backends
from megadit.doctor.report import quiet

OK = Check("machine", "python", "ok", "3.11", needed=True)
CPU = Check("backends", "cuda", "missing", "this torch is a CPU build")


def test_the_report_is_ready_without_what_is_only_useful():
    report = MachineReport((OK, CPU, Check("software", "wandb", "missing", "not installed", "pip install wandb")))
    assert report.ready
    assert report.verdict == "ready for CPU training; GPU: none (this torch is a CPU build)"


def test_a_working_gpu_is_in_the_verdict():
    report = MachineReport((OK, Check("backends", "cuda", "ok", "CUDA 13.0, 8 x A100")))
    assert report.verdict == "ready for GPU training; GPU: CUDA 13.0, 8 x A100"


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_whatever_is_needed_and_does_not_work_makes_it_not_ready(state):
    report = MachineReport(
        (OK, CPU, Check("software", "deepspeed", state, "does not import", "make setup", needed=True))
    )
    assert not report.ready
    assert report.verdict.startswith("not ready for training: deepspeed;")


def test_the_table_is_aligned_and_shows_remedies_only_where_they_help():
    report = MachineReport(
        (OK, Check("machine", "numactl", "missing", "not installed", "apt-get install numactl"), CPU)
    )
    lines = format_report(report).splitlines()
    assert lines[0] == "machine"
    assert lines[1].index("ok") == lines[2].index("missing") == lines[6].index("missing")
    assert lines[3].strip() == "-> apt-get install numactl"
    assert lines[-1] == report.verdict
    healthy = MachineReport((Check("machine", "numactl", "ok", "/usr/bin/numactl", "apt-get install numactl"),))
    assert "->" not in format_report(healthy)


def test_a_stale_build_lock_is_found(monkeypatch, tmp_path):
    lock = tmp_path / "deepspeed_cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine_checks._extension_locks().state == "ok"
    old = time.time() - 3600
    os.utime(lock, (old, old))
    check = machine_checks._extension_locks()
    assert check.state == "broken" and check.remedy == f"rm {lock}"


def test_a_compiler_that_does_not_compile_is_broken(monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    assert machine_checks._compiler().state == "broken"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check = machine_checks._compiler()
    assert check.state == "broken" and "/nowhere/c++" in check.detail


def test_a_full_disk_is_told(tmp_path):
    assert machine_checks._disk("disk", tmp_path, 0.0, "free some").state == "ok"
    assert machine_checks._disk("disk", tmp_path, 1e9, "free some").state == "broken"


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Write an importable module ``name`` and forget it afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "failure", ["raise RuntimeError('no GPU stack')", "raise OSError('no GPU stack')", "exit('no GPU stack')"]
)
def test_a_package_that_does_not_import_is_broken_with_its_reason(package, failure):
    package("planted_package", f"print('noise')\n{failure}\n")
    check = software_checks._package("planted_package", "planted", "make setup", needed=True)
    assert check.state == "broken" and "no GPU stack" in check.detail and check.needed


def test_a_package_that_is_not_there_is_missing():
    check = software_checks._package("no_such_package", "no-such-package", "make setup", needed=False)
    assert (check.state, check.name, check.remedy) == ("missing", "no-such-package", "make setup")


def test_a_version_is_told(package):
    package("planted_fine", "__version__ = '1.2.3'\n")
    check = software_checks._package("planted_fine", "planted-fine", "", needed=False)
    assert (check.state, check.detail) == ("ok", "1.2.3")


def test_a_training_step_that_hangs_is_only_reported():
    process = training_checks.start_step()
    check = training_checks.check_step(process, timeout_s=0.05)
    assert check.state == "broken" and check.needed and "no end after 0.05 s" in check.detail
    assert process.poll() is not None


def test_a_silent_name_server_is_told(monkeypatch):
    def name_service() -> Check:
        return next(check for check in training_checks.check_distributed() if check.name == "name service")

    queried = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(training_checks, "NAMES_TIMEOUT_S", 0.05)
        patch.setattr(socket, "getnameinfo", lambda *_: queried.wait(30))
        check = name_service()
    queried.set()
    assert check.state == "broken" and "no answer" in check.detail and "RES_OPTIONS" in check.remedy
    monkeypatch.setattr(socket, "getnameinfo", lambda *_: ("localhost", "1"))  # nor is this machine's own asked
    assert name_service().detail.endswith("for 127.0.0.1")


def test_a_training_step_that_fails_tells_its_last_line(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('planted: libfoo.so not found')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = training_checks.check_step(training_checks.start_step())
    assert check.state == "broken" and "planted: libfoo.so not found" in check.detail


def test_a_driver_that_answers_an_error_is_broken(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: version mismatch' >&2\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = next(iter(check_backends()))
    assert check.state == "broken" and "version mismatch" in check.detail


def test_a_gpu_beside_a_cpu_torch_is_told(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100, 81920 MiB, 81000 MiB, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu, build, *_ = check_backends()
    assert gpu.state == "ok" and "81000 MiB free of 81920 MiB" in gpu.detail
    assert build.state == "broken" and "CPU build" in build.detail


def test_quiet_drops_what_c_code_prints_too(capfd):
    with quiet():
        print("from Python")
        os.write(1, b"from C\n")
        os.write(2, b"warning from C\n")
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "")


def test_the_command_end_to_end(root):
    result = run_command([sys.executable, "tools/doctor.py", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["ready"] is True
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["torch"] == states["deepspeed"] == states["DeepSpeed step"] == states["gloo"] == "ok"
    assert set(states.values()) <= {"ok", "missing", "broken"}
    assert report["verdict"].startswith("ready for ")


def test_the_command_without_torch_says_so_and_exits_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('planted: no torch here')\n")
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "runpy.run_path('tools/doctor.py', run_name='__main__')"
    )
    result = run_command([sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 1
    assert result.stdout.rstrip().splitlines()[-1].startswith("not ready for training: torch")
    assert "planted: no torch here" in result.stdout and "Traceback" not in result.stdout
