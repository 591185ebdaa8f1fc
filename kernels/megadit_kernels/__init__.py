"""Fused operations, each with a reference in torch of the same signature. Imports nothing of megadit.

``OPS`` lists the operations; ``megadit_kernels.registry`` dispatches calls to implementations.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megadit_kernels.linear import scaled_linear
from megadit_kernels.modulate import gated_residual, layer_norm_modulate
from megadit_kernels.registry import Op, for_autocast

# Lazy path of each operation, by name.
OPS: Mapping[str, str] = MappingProxyType(
    {op.name: f"{op.__module__}:{op.name}" for op in (scaled_linear, layer_norm_modulate, gated_residual)}
)

__all__ = ["OPS", "Op", "for_autocast", "gated_residual", "layer_norm_modulate", "scaled_linear"]
