"""What the operations compute, in plain torch: adaptive norm, gated residual, and both in one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def over_tokens(value: Tensor | None, row: Tensor | None) -> Tensor | None:
    """value (B, n) + row (n,), to be used on (B, T, n): (B, 1, n) or (n,); None where both are."""
    if value is None:
        return row
    return value.unsqueeze(1) if row is None else row + value.unsqueeze(1)


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
    """Norm without affine, then scale and shift: ``norm(x) * (one + scale + scale_row) + shift + shift_row``.

    x (B, T, n); shift and scale (B, n), the sample's; shift_row and scale_row (n,), shared by all samples (a row of
    PixArt's table, or with ``one`` 0 the affine parameters of a plain norm); any of the four may be None. ``norm``:
    layer or rms. ``float32``: computed in float32 and rounded once to x's dtype. Returns (B, T, n).
    """
    dtype = x.dtype
    if float32:
        x = x.float()
        shift, scale, shift_row, scale_row = (
            None if part is None else part.float() for part in (shift, scale, shift_row, scale_row)
        )
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) if norm == "layer" else F.rms_norm(x, x.shape[-1:], eps=eps)
    factor, offset = over_tokens(scale, scale_row), over_tokens(shift, shift_row)
    out = normed * one if factor is None else normed * (one + factor)
    return (out if offset is None else out + offset).to(dtype if float32 else out.dtype)


def gated_residual(x: Tensor, gate: Tensor | None, branch: Tensor, *, gate_row: Tensor | None = None) -> Tensor:
    """``x + (gate + gate_row) * branch``; without both gates ``x + branch``.

    x and branch (B, T, n), gate (B, n), gate_row (n,) -> (B, T, n).
    """
    factor = over_tokens(gate, gate_row)
    return x + branch if factor is None else x + factor * branch


def residual_norm_modulate(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    gate_row: Tensor | None = None,
    shift_row: Tensor | None = None,
    scale_row: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    one: float = 1.0,
    float32: bool = False,
) -> tuple[Tensor, Tensor]:
    """``gated_residual``, and ``norm_modulate`` of its result: the new residual stream and what the next branch takes.

    Arguments as of those two; both results (B, T, n).
    """
    residual = gated_residual(x, gate, branch, gate_row=gate_row)
    return residual, norm_modulate(
        residual,
        shift,
        scale,
        shift_row=shift_row,
        scale_row=scale_row,
        eps=eps,
        norm=norm,
        one=one,
        float32=float32,
    )
