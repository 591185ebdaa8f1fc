"""Normalisation layers, computed in float32 where the configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim, ParamSpec
from megadit.parallel.collectives import copy_to_tensor_parallel_region
from megadit.parallel.tensor import tensor_layout
from megadit_kernels import gated_residual, norm_modulate, residual_norm_modulate

Precision = Literal["auto", "fp32"]

# A residual that is still to be added to the stream: branch (B, T, n), its gate (B, n) where it has one, and the row
# (n,) that is added to the gate where there is one.
PendingResidual = tuple[Tensor, ...]


def add_residual(x: Tensor, pending: PendingResidual) -> Tensor:
    """The stream x (B, T, n) with the pending residual; x itself where ``pending`` is empty."""
    if not pending:
        return x
    branch, gate, gate_row = _parts(pending)
    return gated_residual(x, gate, branch, gate_row=gate_row)


def _parts(pending: PendingResidual) -> tuple[Tensor, Tensor | None, Tensor | None]:
    branch, gate, gate_row, *_ = (*pending, None, None)
    assert branch is not None  # the caller has one
    return branch, gate, gate_row


@contextmanager
def without_autocast(x: Tensor) -> Iterator[None]:
    """Disable a surrounding autocast, which would cast float32 operands to half precision."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # the meta device, where layouts are planned
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


def widens(precision: Precision, x: Tensor) -> bool:
    """Whether a norm of x at this precision computes in float32 what x holds in fewer bits."""
    return precision == "fp32" and x.dtype != torch.float32


def at_precision(precision: Precision, function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """``function(*operands)``; for fp32 computed in float32 and rounded once to the dtype of the first operand."""
    x = operands[0]
    if precision == "auto" or x.dtype == torch.float32:
        return function(*operands)
    with without_autocast(x):
        return function(*(operand.float() for operand in operands)).to(x.dtype)


class ModulatedNorm(nn.Module):
    """LayerNorm without affine, then the sample's own scale and shift; at ``precision`` (see ``at_precision``)."""

    def __init__(self, eps: float, precision: Precision = "auto") -> None:
        super().__init__()
        self.eps, self.precision = eps, precision

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        *,
        shift_row: Tensor | None = None,
        scale_row: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, n), shift and scale (B, n), rows (n,) that are added to them -> (B, T, n) in x's dtype."""
        return norm_modulate(
            x, shift, scale, shift_row=shift_row, scale_row=scale_row, eps=self.eps, float32=widens(self.precision, x)
        )

    def of_stream(
        self,
        x: Tensor,
        pending: PendingResidual,
        shift: Tensor,
        scale: Tensor,
        *,
        shift_row: Tensor | None = None,
        scale_row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream x (B, T, n) with the residual that the block before left pending, if any, and it normed."""
        if not pending:
            return x, self(x, shift, scale, shift_row=shift_row, scale_row=scale_row)
        branch, gate, gate_row = _parts(pending)
        return self.after_residual(
            x, gate, branch, shift, scale, gate_row=gate_row, shift_row=shift_row, scale_row=scale_row
        )

    def after_residual(
        self,
        x: Tensor,
        gate: Tensor | None,
        branch: Tensor,
        shift: Tensor,
        scale: Tensor,
        *,
        gate_row: Tensor | None = None,
        shift_row: Tensor | None = None,
        scale_row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream ``x + gate * branch``, and it normed and modulated: (B, T, n) twice; gate (B, n) or 1."""
        return residual_norm_modulate(
            x,
            gate,
            branch,
            shift,
            scale,
            gate_row=gate_row,
            shift_row=shift_row,
            scale_row=scale_row,
            eps=self.eps,
            float32=widens(self.precision, x),
        )


class MuRMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned gain, initially 1."""

    def __init__(self, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((dim,), "one")}
        self.weight = nn.Parameter(torch.empty(dim.size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class HeadNormGain(nn.Module):
    """The gain of an RMSNorm of heads, initially 1, for ``qk_norm``, which norms.

    Tensor parallelism shards the heads, which share the gain, so that its gradient is summed over ranks.
    """

    def __init__(self, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        layout = tensor_layout()
        self.layout = layout if layout.size > 1 else None
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((dim,), "one")}
        self.weight = nn.Parameter(torch.empty(dim.size))

    def forward(self) -> Tensor:
        """The gain (d,). A view, which stays when ZeRO-3 releases the parameter right after this call."""
        if self.layout is None:
            return self.weight.view_as(self.weight)
        return copy_to_tensor_parallel_region(self.weight, self.layout)


class MuLayerNorm(nn.Module):
    """LayerNorm with a learned gain and bias, initially 1 and 0; at ``precision`` (see ``at_precision``).

    Of a stream of tokens: where sequence parallelism shards it, gradients of gain and bias are summed over ranks.
    """

    def __init__(self, dim: Dim, param: Parametrization, eps: float, precision: Precision) -> None:
        super().__init__()
        self.eps, self.precision = eps, precision
        layout = tensor_layout()
        self.layout = layout if layout.sequence and layout.size > 1 else None
        self.param_specs: dict[str, ParamSpec] = {
            "weight": param.spec((dim,), "one"),
            "bias": param.spec((dim,), "zero"),
        }
        self.weight = nn.Parameter(torch.empty(dim.size))
        self.bias = nn.Parameter(torch.empty(dim.size))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x, or x + branch, normed, and that stream itself: (B, T, n) twice in x's dtype.

        A call of the module, since whatever gathers its parameters (ZeRO-3) or watches it hooks into calls.
        """
        if branch is None:
            return norm_modulate(x, None, None, **self._affine(x)), x
        x, normed = residual_norm_modulate(x, None, branch, None, None, **self._affine(x))
        return normed, x

    def _affine(self, x: Tensor) -> dict[str, Any]:
        """Gain and bias as the rows that all samples share, and no 1 beside the gain."""
        gain: Tensor = self.weight
        bias: Tensor = self.bias
        if self.layout is not None:
            gain = copy_to_tensor_parallel_region(gain, self.layout)
            bias = copy_to_tensor_parallel_region(bias, self.layout)
        options = {"eps": self.eps, "float32": widens(self.precision, x)}
        return {"shift_row": bias, "scale_row": gain, "one": 0.0, **options}
