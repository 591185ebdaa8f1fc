"""Fused operations, each with a torch reference of the same signature. Imports nothing of megadit.

An operation is one file, entered in ``OPS``; ``megadit_kernels.registry`` says how a call is dispatched.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megadit_kernels.linear import scaled_linear
from megadit_kernels.modulate import gated_residual, layer_norm_modulate
from megadit_kernels.registry import Op, for_autocast

# Where each operation is, by its name.
OPS: Mapping[str, str] = MappingProxyType(
    {op.name: f"{op.__module__}:{op.name}" for op in (scaled_linear, layer_norm_modulate, gated_residual)}
)

__all__ = ["OPS", "Op", "for_autocast", "gated_residual", "layer_norm_modulate", "scaled_linear"]
