"""Detection of kernel backends: lazy, never an exception, the reason kept."""

from __future__ import annotations

import sys

import pytest

from helpers.ranks import run_command
from megadit_kernels import backends
from megadit_kernels.backends import Unavailable, backend, backend_names, works


@pytest.fixture(autouse=True)
def _ask_again():
    backend.cache_clear()
    yield
    backend.cache_clear()


def plant(monkeypatch, probe):
    calls = []

    def counted():
        calls.append(1)
        return probe()

    monkeypatch.setattr(backends, "_probes", lambda: {"planted": counted})
    return calls


def raising(error):
    def probe():
        raise error

    return probe


def test_every_backend_answers():
    for name in backend_names():
        probe = backend(name)
        assert probe.name == name and probe.detail and probe.works == (probe.state == "ok") == works(name)


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        backend("cudnn-dreams")


@pytest.mark.parametrize(
    "error", [RuntimeError("no driver\nlong story"), OSError("no driver"), ImportError("no driver")]
)
def test_whatever_a_probe_raises_is_kept_as_the_reason(monkeypatch, error):
    plant(monkeypatch, raising(error))
    probe = backend("planted")
    assert (probe.state, probe.works) == ("broken", False)
    assert probe.detail == f"{type(error).__name__}: no driver"


def test_a_wrong_result_is_broken():
    import torch

    with pytest.raises(AssertionError):
        backends._assert_close(torch, torch.tensor(31.0), torch.tensor(32.0), 0.0)


def test_missing_hardware_is_missing_and_not_broken(monkeypatch):
    plant(monkeypatch, raising(Unavailable("no GPU", "buy one")))
    probe = backend("planted")
    assert (probe.state, probe.detail, probe.remedy) == ("missing", "no GPU", "buy one")


def test_each_answer_is_found_once(monkeypatch):
    calls = plant(monkeypatch, lambda: "1.0")
    assert backend("planted") is backend("planted")
    assert len(calls) == 1


def test_the_other_package_called_apex_is_not_taken_for_nvidias(monkeypatch, tmp_path):
    (tmp_path / "apex.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    probe = backend("apex")
    assert probe.state == "missing" and "not NVIDIA's" in probe.detail


def test_an_installed_gpu_library_without_a_gpu_is_told_apart(monkeypatch, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "flash_attn.py").write_text("raise RuntimeError('must not be imported without a GPU')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    probe = backend("flash-attn")
    assert probe.state == "missing" and "is installed, but" in probe.detail


def test_asking_for_nothing_imports_nothing():
    program = (
        "import sys, megadit_kernels.backends as b; b.backend_names(); "
        "assert not {'triton', 'flash_attn', 'transformer_engine', 'amp_C'} & set(sys.modules)"
    )
    result = run_command([sys.executable, "-c", program], timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "bf16", "triton", "flash-sdpa"])
def test_what_every_recent_gpu_has_works(name):
    probe = backend(name)
    assert probe.works, probe
