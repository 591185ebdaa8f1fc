"""``train.tf32``: which flags of torch are set on a GPU, what the start of a run says, and that a CPU is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megadit.config import load
from megadit.config.schema.run import TrainConfig
from megadit.engine.tf32 import arithmetic, describe_tf32, set_tf32
from megadit.plan import peak_flops


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(steps=1, **settings)


# (tf32, precision), then products and convolutions.
CASES = {
    ("auto", "fp32"): (True, True),
    ("auto", "bf16"): (False, True),
    ("auto", "fp16"): (False, True),
    (True, "fp32"): (True, True),
    (True, "bf16"): (True, True),
    (False, "fp32"): (False, False),
    (False, "bf16"): (False, False),
}


@pytest.mark.parametrize("start", [(False, False), (True, True)])
@pytest.mark.parametrize("case", list(CASES))
def test_flags_follow_the_configuration_whatever_they_were(case: Any, start: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = start
    set_tf32(config(tf32=case[0], precision=case[1]), "cuda")
    products, convolutions = CASES[case]
    assert flags() == (products, convolutions)
    # What reads the one interface or the other agrees: torch.compile asks for the matmul precision.
    assert torch.get_float32_matmul_precision() == ("high" if products else "highest")
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if products else "ieee")
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == convolutions


@pytest.mark.parametrize("tf32", ["auto", True, False])
def test_on_a_cpu_no_flag_changes(tf32: Any) -> None:
    before = flags(), torch.backends.mkldnn.matmul.fp32_precision
    set_tf32(config(tf32=tf32), "cpu")
    set_tf32(config(tf32=True), "cuda")  # nor does a GPU's setting reach the CPU's matrix products
    assert torch.backends.mkldnn.matmul.fp32_precision == before[1]
    set_tf32(config(tf32=tf32), "cpu")
    assert flags() == (True, True)
    said = describe_tf32(config(tf32=tf32), "cpu")
    assert said == ("TF32: train.tf32 true has no effect on a CPU" if tf32 is True else None)


def test_the_start_of_a_run_says_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert describe_tf32(config(), "cuda") == "TF32: float32 matrix products and convolutions"
    assert describe_tf32(config(precision="bf16"), "cuda") == "TF32: float32 convolutions"
    assert describe_tf32(config(tf32=False), "cuda") == "TF32: none, as configured"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert describe_tf32(config(), "cuda") == "TF32: none, NVIDIA_TF32_OVERRIDE=0 switches it off"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5" in str(describe_tf32(config(tf32=True), "cuda"))


def test_the_utilization_of_a_gpu_is_told_against_the_peak_of_what_multiplies() -> None:
    assert [arithmetic(config(tf32=case)) for case in ("auto", True, False)] == ["tf32", "tf32", "fp32"]
    assert arithmetic(config(tf32=True, precision="bf16")) == "bf16"
    rates = [peak_flops("NVIDIA A100-SXM4-80GB", kind) for kind in ("fp32", "tf32", "bf16", "fp16")]
    assert rates == [19.5e12, 156e12, 312e12, 312e12]


def test_dit_of_the_paper_trains_in_it_as_its_authors_code_does() -> None:
    assert load("dit/xl-2.yaml").config.train.tf32 is True
    assert load("dit/xl-2.yaml", ["train.tf32=false"]).config.train.tf32 is False
    assert load("quickstart/digits.yaml").config.train.tf32 == "auto"
    with pytest.raises(ValidationError, match="tf32"):
        config(tf32="yes")


@pytest.mark.gpu
def test_a_gpu_rounds_products_as_told() -> None:
    a = torch.randn(256, 256, device="cuda")
    exact = a.double() @ a.double()
    errors = []
    for tf32 in (True, False):
        set_tf32(config(tf32=tf32), "cuda")
        errors.append(float((a @ a - exact).abs().max() / exact.abs().max()))
    assert errors[1] < 1e-5 and (errors[0] > 1e-5 or torch.cuda.get_device_capability() < (8, 0))
