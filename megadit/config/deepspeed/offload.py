"""What a DeepSpeed file's ``zero_optimization`` block moves to the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def offloads_optimizer(zero: Mapping[str, Any]) -> bool:
    """Whether the block keeps master weights and moments on the CPU."""
    block = zero.get("offload_optimizer")
    return _is_on(block) if isinstance(block, dict) else bool(zero.get("cpu_offload"))


def offloads_parameters(zero: Mapping[str, Any]) -> bool:
    """Whether the block keeps the weights on the CPU."""
    return _is_on(zero.get("offload_param"))


def _is_on(block: Any) -> bool:
    return isinstance(block, dict) and block.get("device", "none") not in (None, "none")
