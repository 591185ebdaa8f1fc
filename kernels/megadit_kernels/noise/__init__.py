"""Keyed noise, its mixture with samples and the squared error; on a GPU with Triton a kernel each (``fused``).

The fused noise is that of the reference: the integers of Philox and the uniforms made of them are equal to the bit, the
normals to the rounding of log, sine and cosine (at most 1e-6).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megadit_kernels.noise import reference
from megadit_kernels.registry import Op, triton_runs

keyed_normal = Op(reference.keyed_normal)
mix_noise = Op(reference.mix_noise)
squared_error = Op(reference.squared_error)

keyed_normal.implementation("torch", device=None, works=lambda: True)(keyed_normal.reference)
mix_noise.implementation("torch", device=None, works=lambda: True)(mix_noise.reference)
squared_error.implementation("torch", device=None, works=lambda: True)(squared_error.reference)


@keyed_normal.implementation("fused", works=triton_runs)
def _fused_normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    from megadit_kernels.noise.fused import normal

    out: Tensor = normal(keys, list(shape))
    return out


@mix_noise.implementation("fused", works=triton_runs)
def _fused_mix(x0: Tensor, keys: Tensor, signal: Tensor, sigma: Tensor, target: str) -> tuple[Tensor, Tensor]:
    from megadit_kernels.noise.fused import mix

    x, aim = mix(x0, keys, signal, sigma, target)
    return x, aim


@squared_error.implementation("fused", works=triton_runs)
def _fused_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    from megadit_kernels.noise.fused import error

    out: Tensor = error(output, target, weight)
    return out
