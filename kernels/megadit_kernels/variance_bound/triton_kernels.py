"""Triton kernels of the variational bound of a learned variance: a program takes ``CHUNK``
elements of a sample, or ``BLOCK``.

Rows of the model's output are read in place: variance and prediction are samples ``row`` elements apart. Importing
this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cdf(y):
    """The normal CDF by its tanh approximation, as a sigmoid."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))


@triton.jit
def density(y):
    """The slope of ``cdf``."""
    value = cdf(y)
    return value * (1.0 - value) * 1.5957691216057308 * (1.0 + 0.134145 * y * y)


@triton.jit
def probability(x0, upper, lower):
    """Of the bin of 8-bit data around x0, by the CDF at its edges; the first bin and the last are open."""
    return tl.where(x0 < -0.999, upper, tl.where(x0 > 0.999, 1.0 - lower, upper - lower))


@triton.jit
def model_of(variance, given, x, table, PREDICTS: tl.constexpr):
    """Log variance and mean of the model's Gaussian; ``table`` points to a sample's row of coefficients."""
    low, high = tl.load(table), tl.load(table + 1)
    from_x0, from_x = tl.load(table + 2), tl.load(table + 3)
    signal, sigma = tl.load(table + 4), tl.load(table + 5)
    share = (variance + 1.0) * 0.5
    log_variance = share * high + (1.0 - share) * low
    if PREDICTS == "noise":
        denoised = (x - sigma * given) / signal
    else:
        denoised = signal * x - sigma * given
    return log_variance, from_x0 * denoised + from_x * x


@triton.jit
def bound(
    variance, prediction, x0, x, coefficients, out, v_row, p_row,
    COUNT: tl.constexpr, PREDICTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (chunks, B): each chunk's part of the bits per dimension. Grid: (B, chunks of CHUNK elements)."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = coefficients + sample * 7
    low, from_x0, from_x, first = tl.load(table), tl.load(table + 2), tl.load(table + 3), tl.load(table + 6)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        offsets = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = offsets < COUNT
        given = tl.load(prediction + sample * p_row + offsets, mask=inside, other=0.0).to(tl.float32)
        spread = tl.load(variance + sample * v_row + offsets, mask=inside, other=0.0).to(tl.float32)
        clean = tl.load(x0 + sample * COUNT + offsets, mask=inside, other=0.0)
        noisy = tl.load(x + sample * COUNT + offsets, mask=inside, other=0.0)
        log_variance, mean = model_of(spread, given, noisy, table, PREDICTS)
        if first > 0.0:
            inverse = tl.exp(-0.5 * log_variance)
            upper = cdf((clean - mean + 0.00392156862745098) * inverse)
            lower = cdf((clean - mean - 0.00392156862745098) * inverse)
            nats = -tl.log(tl.maximum(probability(clean, upper, lower), 1e-12))
        else:
            ratio = log_variance - low
            distance = from_x0 * clean + from_x * noisy - mean
            nats = 0.5 * (ratio - 1.0 + tl.exp(-ratio) + distance * distance * tl.exp(-log_variance))
        total += tl.where(inside, nats, 0.0)
    tl.store(out + chunk * tl.num_programs(0) + sample, tl.sum(total, 0) / COUNT * 1.4426950408889634)


@triton.jit
def bound_backward(
    variance, prediction, x0, x, coefficients, grad, out, v_row, p_row,
    COUNT: tl.constexpr, PREDICTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, COUNT): the gradient of variance from ``grad`` (B,). Grid: (B, blocks)."""
    sample = tl.program_id(0).to(tl.int64)
    table = coefficients + sample * 7
    low, high, first = tl.load(table), tl.load(table + 1), tl.load(table + 6)
    from_x0, from_x = tl.load(table + 2), tl.load(table + 3)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < COUNT
    given = tl.load(prediction + sample * p_row + offsets, mask=inside, other=0.0).to(tl.float32)
    spread = tl.load(variance + sample * v_row + offsets, mask=inside, other=0.0).to(tl.float32)
    clean = tl.load(x0 + sample * COUNT + offsets, mask=inside, other=0.0)
    noisy = tl.load(x + sample * COUNT + offsets, mask=inside, other=0.0)
    log_variance, mean = model_of(spread, given, noisy, table, PREDICTS)
    if first > 0.0:
        inverse = tl.exp(-0.5 * log_variance)
        above = (clean - mean + 0.00392156862745098) * inverse
        below = (clean - mean - 0.00392156862745098) * inverse
        chance = probability(clean, cdf(above), cdf(below))
        rise = tl.where(clean > 0.999, 0.0, density(above) * above)
        rise = rise - tl.where(clean < -0.999, 0.0, density(below) * below)
        slope = tl.where(chance < 1e-12, 0.0, 0.5 * rise / tl.maximum(chance, 1e-12))
    else:
        distance = from_x0 * clean + from_x * noisy - mean
        slope = 0.5 * (1.0 - tl.exp(low - log_variance) - distance * distance * tl.exp(-log_variance))
    slope = slope * (high - low) * 0.5
    slope = slope * (tl.load(grad + sample) / COUNT * 1.4426950408889634)
    tl.store(out + sample * COUNT + offsets, slope.to(out.dtype.element_ty), mask=inside)
