"""Adaptive norm and gated residual of a Transformer block, apart and in one: see ``reference`` for what they compute.

On a GPU with Triton each is one kernel in either direction (``fused``), which computes in float32 whatever it is given.
``apex``, chosen by name alone, norms by NVIDIA apex's kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.backends import works
from megadit_kernels.norm_modulate import reference
from megadit_kernels.registry import Op, triton_runs

norm_modulate = Op(reference.norm_modulate)
gated_residual = Op(reference.gated_residual)
residual_norm_modulate = Op(reference.residual_norm_modulate)


@norm_modulate.implementation("torch", device=None, works=lambda: True)
def _norm_addcmul(x: Tensor, shift: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    """Fewer passes for LayerNorm with the sample's own shift and scale, or with gain and bias."""
    if shift is None and scale is None and options.get("one") == 0.0 and options.get("norm", "layer") == "layer":
        gain, bias = options.get("scale_row"), options.get("shift_row")
        if gain is not None and bias is not None:
            return _affine(x, gain, bias, options.get("eps", 1e-6), bool(options.get("float32")))
    factor = reference.over_tokens(scale, options.get("scale_row"))
    offset = reference.over_tokens(shift, options.get("shift_row"))
    if factor is None or offset is None or options.get("norm", "layer") != "layer" or options.get("float32"):
        return reference.norm_modulate(x, shift, scale, **options)
    normed = F.layer_norm(x, x.shape[-1:], eps=options.get("eps", 1e-6))
    return torch.addcmul(offset, normed, options.get("one", 1.0) + factor)


def _affine(x: Tensor, gain: Tensor, bias: Tensor, eps: float, float32: bool) -> Tensor:
    """torch's own LayerNorm with gain and bias (n,)."""
    if not float32:
        return F.layer_norm(x, gain.shape, gain, bias, eps)
    return F.layer_norm(x.float(), gain.shape, gain.float(), bias.float(), eps).to(x.dtype)


@gated_residual.implementation("torch", device=None, works=lambda: True)
def _gated_addcmul(x: Tensor, gate: Tensor | None, branch: Tensor, *, gate_row: Tensor | None = None) -> Tensor:
    factor = reference.over_tokens(gate, gate_row)
    return x + branch if factor is None else torch.addcmul(x, factor, branch)


@residual_norm_modulate.implementation("torch", device=None, works=lambda: True)
def _in_two(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    gate_row: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    residual = _gated_addcmul(x, gate, branch, gate_row=gate_row)
    return residual, _norm_addcmul(residual, shift, scale, **options)


def _fused(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    gate_row: Tensor | None = None,
    shift_row: Tensor | None = None,
    scale_row: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    one: float = 1.0,
    float32: bool = True,
) -> tuple[Tensor, Tensor]:
    from megadit_kernels.norm_modulate.fused import run

    residual, y, _, _ = run(x, branch, gate, gate_row, shift, shift_row, scale, scale_row, eps, norm, one)
    return residual, y


residual_norm_modulate.implementation("fused", works=triton_runs)(_fused)


@norm_modulate.implementation("fused", works=triton_runs)
def _fused_norm(x: Tensor, shift: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    return _fused(x, None, None, shift, scale, **options)[1]


@gated_residual.implementation("fused", works=triton_runs)
def _fused_residual(x: Tensor, gate: Tensor | None, branch: Tensor, *, gate_row: Tensor | None = None) -> Tensor:
    return _fused(x, gate, branch, None, None, gate_row=gate_row, norm="none")[0]


@norm_modulate.implementation("apex", works=functools.partial(works, "apex-norm"), automatic=False)
def _apex_norm(x: Tensor, shift: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    from megadit_kernels.norm_modulate import apex

    return apex.norm_modulate(x, shift, scale, **options)


@residual_norm_modulate.implementation("apex", works=functools.partial(works, "apex-norm"), automatic=False)
def _apex_in_two(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    gate_row: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    residual = _gated_addcmul(x, gate, branch, gate_row=gate_row)
    return residual, _apex_norm(residual, shift, scale, **options)


gated_residual.implementation("apex", device=None, works=lambda: True, automatic=False)(_gated_addcmul)
