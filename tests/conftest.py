"""Settings for the whole test run. They must be in place before torch or DeepSpeed is imported, so none is above."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

from helpers import rounding  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """No network, no compiler; one thread, and the GPU only where ``-m gpu`` asks for it, so that runs are alike.

    Where other rounding is asked for, what changes it comes last.
    """
    os.environ.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        MPLBACKEND="Agg",
        WANDB_MODE="disabled",
    )
    os.environ.update(rounding.ENVIRONMENTS[rounding.variant()])
    # Torch's store asks name servers who 127.0.0.1 is, at every connection: a silent one would cost 10 s and more each.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # importing it costs each process more than a second
    if not _wants_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; the library itself never asks for it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_report_header() -> str:
    return f"rounding: {rounding.variant()} ({rounding.VARIABLE})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _wants_gpu(config):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="GPU tests run under: pytest -m gpu"))


def _wants_gpu(config: pytest.Config) -> bool:
    expression = str(config.getoption("markexpr", "") or "")
    return bool(re.search(r"\bgpu\b", expression)) and not re.search(r"\bnot\s+gpu\b", expression)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums in one fixed order, and no idle OpenMP threads that a forked rank could inherit half-alive."""
    import torch

    torch.set_num_threads(rounding.threads())


@pytest.fixture(scope="session", autouse=True)
def _order_of_sums() -> Iterator[None]:
    """Around everything, so that what a module's fixture trains and what its tests do round alike."""
    with rounding.sums():
        yield


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Each test starts outside any launcher, and what it leaves in the environment goes with it.

    The library completes RANK, MASTER_PORT and the rest in the process that calls it; left there, they would make
    every command started later believe that it is a rank of one group.
    """
    from megadit.parallel.environment import is_rank_variable

    for name in filter(is_rank_variable, list(os.environ)):
        del os.environ[name]
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
