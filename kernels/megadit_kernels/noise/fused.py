"""The Triton implementation of keyed noise, its mixture with samples and the squared error: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadit_kernels.noise import triton_kernels
from megadit_kernels.operators import KernelOperator, launches
from megadit_kernels.partial_sums import add_up, chunks_of

_COUNTERS = 256  # per program; a thread of 4 warps takes two, each of 16 bytes of float32
_ELEMENTS = 1024  # per program of the error's gradient
_STRIP = 2048  # elements of a sample that the error's program adds at once


def _grid(samples: Tensor, count: int, block: int) -> tuple[int, int]:
    return len(samples), -(-count // block)


def launch_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """keys (B,) -> float32 (B, *shape)."""
    out = keys.new_empty((keys.shape[0], *shape), dtype=torch.float32)
    if launches(out):
        count = math.prod(shape)
        triton_kernels.normal[_grid(keys, count, 4 * _COUNTERS)](keys.contiguous(), out, COUNT=count, BLOCK=_COUNTERS)
    return out


normal_operator = torch.library.custom_op("megadit::keyed_normal", launch_normal, mutates_args=())
normal_operator.register_fake(launch_normal)


def normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """``launch_normal``, under torch.compile as an operator; there is nothing to differentiate by."""
    return normal_operator(keys, shape) if torch.compiler.is_compiling() else launch_normal(keys, shape)


def launch_mix(x0: Tensor, keys: Tensor, signal: Tensor, sigma: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """x0 (B, ...), the rest (B,) -> (noisy samples, target), float32 of the shape of x0."""
    x = x0.new_empty(x0.shape, dtype=torch.float32)
    aim = x0.new_empty(x0.shape, dtype=torch.float32)
    if launches(x):
        count = x0[0].numel()
        triton_kernels.mix[_grid(x0, count, 4 * _COUNTERS)](
            x0.contiguous(), keys.contiguous(), signal.contiguous(), sigma.contiguous(), x, aim,
            COUNT=count, TARGET=target, BLOCK=_COUNTERS,
        )  # fmt: skip
    return x, aim


def mix_backward(dx: Tensor, daim: Tensor, signal: Tensor, sigma: Tensor, target: str) -> Tensor:
    """The gradient of x0. In plain torch: training asks for none, a codec is not trained."""
    each = (-1, *[1] * (dx.dim() - 1))
    grad = signal.reshape(each) * dx
    if target == "noise":
        return grad
    return grad - (daim if target == "velocity" else sigma.reshape(each) * daim)


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.target, ctx.dtype = inputs[4], inputs[0].dtype


def _mix_gradients(launch: Callable[..., Tensor], ctx: Any, dx: Tensor, daim: Tensor) -> tuple[Tensor | None, ...]:
    signal, sigma = ctx.saved_tensors
    return launch(dx, daim, signal, sigma, ctx.target).to(ctx.dtype), None, None, None, None


def launch_error(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """output, target (B, ...), weight (B,) or None -> float32 (B,)."""
    out = output.new_empty((output.shape[0],), dtype=torch.float32)
    if launches(out):
        rows = output.flatten(1)  # of an output that has the variance beside it a view, not a copy
        chunk, chunks = chunks_of(rows.shape[1], _STRIP)
        parts = out if chunks == 1 else out.new_empty((chunks, len(out)))
        triton_kernels.error[(len(rows), chunks)](
            rows, target.contiguous(), target if weight is None else weight.contiguous(), parts, rows.stride(0),
            COUNT=rows.shape[1], WEIGHTED=weight is not None, CHUNK=chunk, BLOCK=_STRIP,
        )  # fmt: skip
        if chunks > 1:
            add_up(parts, out)
    return out


def launch_error_backward(output: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient of output from that of the errors, (B,)."""
    out = output.new_empty(output.shape)
    if launches(out):
        rows = output.flatten(1)
        triton_kernels.error_backward[_grid(rows, rows.shape[1], _ELEMENTS)](
            rows, target.contiguous(), target if weight is None else weight.contiguous(), grad.contiguous(), out,
            rows.stride(0), COUNT=rows.shape[1], WEIGHTED=weight is not None, BLOCK=_ELEMENTS,
        )  # fmt: skip
    return out


def _save_error(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _error_gradients(launch: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    output, target, weight = ctx.saved_tensors
    slope = launch(output, target, weight, grad)
    return slope, (-slope).to(target.dtype) if ctx.needs_input_grad[1] else None, None


mix = KernelOperator("mix_noise", launch_mix, mix_backward, _save_mix, _mix_gradients)
error = KernelOperator("squared_error", launch_error, launch_error_backward, _save_error, _error_gradients)
