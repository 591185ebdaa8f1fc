"""Norms by NVIDIA apex's fused LayerNorm and RMSNorm, where apex is installed; residual and modulation by torch.

The calls follow ``apex/normalization/fused_layer_norm.py`` of https://github.com/NVIDIA/apex (2026-07). No text of apex
is copied.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megadit_kernels.norm_modulate import reference


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    shift_row: Tensor | None = None,
    scale_row: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    one: float = 1.0,
    float32: bool = False,
) -> Tensor:
    """As ``reference.norm_modulate``; gain and bias alone go into apex's kernel, other modulation comes after it.

    Raises:
        ImportError: apex, or its compiled module ``fused_layer_norm_cuda``, is not installed.
    """
    apex: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    dtype, shape = x.dtype, (x.shape[-1],)
    if float32:
        x = x.float()
        shift, scale, shift_row, scale_row = (
            None if part is None else part.float() for part in (shift, scale, shift_row, scale_row)
        )
    is_affine = norm == "layer" and one == 0.0 and shift is None and scale is None
    if is_affine and shift_row is not None and scale_row is not None:
        same = scale_row.dtype == x.dtype == shift_row.dtype
        affine = apex.fused_layer_norm_affine if same else apex.mixed_dtype_fused_layer_norm_affine
        out: Tensor = affine(x, scale_row, shift_row, shape, eps)
        return out.to(dtype)
    plain = apex.fused_layer_norm if norm == "layer" else apex.fused_rms_norm
    normed: Tensor = plain(x, shape, eps)
    factor, offset = reference.over_tokens(scale, scale_row), reference.over_tokens(shift, shift_row)
    if factor is not None and offset is not None:
        return torch.addcmul(offset, normed, one + factor).to(dtype)
    out = normed * one if factor is None else normed * (one + factor)
    return (out if offset is None else out + offset).to(dtype)
