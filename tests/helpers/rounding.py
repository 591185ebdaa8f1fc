"""Other rounding for the whole test run: what another CPU, thread count or library does to the last bits.

``MEGADIT_TEST_ROUNDING=VARIANT make test`` (or ``make test-rounding`` for all of them) runs the tests so. Nothing here
imports torch at import, since its libraries read their environment once, when they are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

VARIABLE = "MEGADIT_TEST_ROUNDING"
NORMAL = "none"
# What the libraries under torch are told: its own kernels, MKL's and oneDNN's.
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    NORMAL: {},
    # The instructions that every x86-64 CPU has.
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    # Threads that wait asleep: spinning ones starve each other where test processes run beside each other.
    "threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    # Matrix products whose inner sums run backwards: another order on every machine.
    "reversed": {},
}


def variant() -> str:
    """The one that the environment asks for.

    Raises:
        pytest.UsageError: there is no such variant.
    """
    name = os.environ.get(VARIABLE) or NORMAL
    if name not in ENVIRONMENTS:
        raise pytest.UsageError(f"{VARIABLE}={name}: choose one of {', '.join(ENVIRONMENTS)}")
    return name


def threads() -> int:
    """Of torch in the test process."""
    return int(ENVIRONMENTS[variant()].get("OMP_NUM_THREADS", "1"))


def sums() -> AbstractContextManager[Any]:
    """Around all tests: the order in which matrix products add."""
    return reversed_sums() if variant() == "reversed" else nullcontext()


def reversed_sums() -> TorchDispatchMode:
    """A context in which matrix products add up their inner dimension backwards."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    # The operands whose last and last-but-one dimensions are summed over.
    operands = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}

    class ReversedSums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operand_positions = operands.get(func.overloadpacket)
            if operand_positions is not None and func._overloadname == "default":
                left, right = operand_positions
                flipped = list(args)
                flipped[left], flipped[right] = args[left].flip(-1), args[right].flip(-2)
                args = tuple(flipped)
            return func(*args, **(kwargs or {}))

    return ReversedSums()
