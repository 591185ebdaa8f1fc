"""Fused operations, each with a reference in torch of the same signature. Imports nothing of megadit.

``OPS`` lists the operations; ``megadit_kernels.registry`` dispatches calls to implementations.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megadit_kernels.attention import attends_without_mask, attention, cumulative_lengths
from megadit_kernels.gelu import bias_gelu
from megadit_kernels.linear import scaled_linear
from megadit_kernels.noise import keyed_normal, mix_noise, squared_error
from megadit_kernels.norm_modulate import gated_residual, norm_modulate, residual_norm_modulate
from megadit_kernels.qk_norm import qk_norm
from megadit_kernels.registry import Op, for_autocast
from megadit_kernels.swiglu import swiglu
from megadit_kernels.variance_bound import variance_bound

# Lazy path of each operation, by name.
OPS: Mapping[str, str] = MappingProxyType(
    {
        op.name: f"megadit_kernels:{op.name}"
        for op in (
            scaled_linear,
            norm_modulate,
            gated_residual,
            residual_norm_modulate,
            swiglu,
            qk_norm,
            bias_gelu,
            keyed_normal,
            mix_noise,
            squared_error,
            variance_bound,
            attention,
        )
    }
)

# Which operations a key of the configuration, kernels.<key>, selects.
OPS_OF_KEY: Mapping[str, tuple[Op[Any, Any], ...]] = MappingProxyType(
    {
        "norm_modulate": (residual_norm_modulate, norm_modulate, gated_residual),
        "swiglu": (swiglu,),
        "noise": (mix_noise, keyed_normal, squared_error, variance_bound),
        "qk_norm": (qk_norm,),
        "attention": (attention,),
        "gelu": (bias_gelu,),
    }
)

# The keys whose operations have a kernel called fused; attention goes by other names.
FUSED_KEYS = tuple(key for key, ops in OPS_OF_KEY.items() if all("fused" in op.names() for op in ops))


def select_all(choice: str) -> None:
    """``auto``, ``torch`` or ``fused`` for all keys' operations; auto for those without such an implementation."""
    for ops in OPS_OF_KEY.values():
        for op in ops:
            op.select(choice if choice in op.names() else "auto")


def choose_all(device: str) -> None:
    """Let every operation choose what runs on this type of device, before torch.compile traces its calls."""
    for name in OPS:
        globals()[name].choose(device)
    from megadit_kernels.attention.flash import keep_in_graphs

    keep_in_graphs()


__all__ = [
    "FUSED_KEYS",
    "OPS",
    "OPS_OF_KEY",
    "Op",
    "attends_without_mask",
    "attention",
    "bias_gelu",
    "choose_all",
    "cumulative_lengths",
    "for_autocast",
    "gated_residual",
    "keyed_normal",
    "mix_noise",
    "norm_modulate",
    "qk_norm",
    "residual_norm_modulate",
    "scaled_linear",
    "select_all",
    "squared_error",
    "swiglu",
    "variance_bound",
]
