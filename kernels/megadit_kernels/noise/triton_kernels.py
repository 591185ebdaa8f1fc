"""Triton kernels of keyed noise, of its mixture with samples, and of the squared error that trains on it.

A program of ``normal`` and ``mix`` takes ``BLOCK`` Philox counters of one sample, each of which gives four elements;
one of ``error`` ``CHUNK`` elements of one, one of ``error_backward`` ``BLOCK``. Importing this module needs Triton.

The uniforms are those of ``reference.unit`` to the bit. The angle is rounded as there, so that a normal differs from
the reference's by the rounding of log, sqrt, cos and sin alone.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(key, counter):
    """Ten rounds of Philox 4x32: the four uint32 words of each ``counter`` (below 2^32) under an int64 key."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = c0 * 0
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """(word + 1/2) / 2^32 in float32, rounded once: in (0, 1]."""
    return (word.to(tl.int64) * 2 + 1).to(tl.float32) * 1.1641532182693481e-10


@triton.jit
def cos_sin(angle):
    """Cosine and sine of 0 <= angle <= 2 pi to two units in the last place of 1.

    Reduced by multiples of pi / 2 in three parts, whose products with a quadrant of at most 4 are exact; polynomials of
    Cephes. tl.cos would keep a table in local memory for angles that do not occur here.
    """
    quadrant = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quadrant * 1.5703125
    r = r - quadrant * 4.837512969970703e-4
    r = r - quadrant * 7.54978995489188e-8
    z = r * r
    sine = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    which = quadrant.to(tl.int32)
    swapped = (which & 1) == 1
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    c = tl.where(((which + 1) & 2) == 2, -c, c)
    s = tl.where((which & 2) == 2, -s, s)
    return c, s


@triton.jit
def box_muller(word0, word1):
    """Two standard normals of two words."""
    radius = tl.sqrt_rn(-2.0 * tl.log(unit(word0)))
    c, s = cos_sin(unit(word1) * 6.283185307179586)
    return radius * c, radius * s


@triton.jit
def noise_of(key, first, BLOCK: tl.constexpr):
    """The standard normals of counters ``first`` to ``first + BLOCK`` in order: (4 BLOCK,)."""
    w0, w1, w2, w3 = philox(key, first + tl.arange(0, BLOCK))
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * BLOCK,))


@triton.jit
def normal(keys, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """out (B, COUNT): the first standard normals of each key's stream. Grid: (B, blocks)."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    offsets = first * 4 + tl.arange(0, 4 * BLOCK)
    noise = noise_of(tl.load(keys + sample), first, BLOCK)
    tl.store(out + sample * COUNT + offsets, noise, mask=offsets < COUNT)


@triton.jit
def mix(x0, keys, signal, sigma, x, aim, COUNT: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    """x = signal x0 + sigma noise and the target ``aim``, all (B, COUNT); signal and sigma (B,). Grid: (B, blocks)."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    offsets = first * 4 + tl.arange(0, 4 * BLOCK)
    inside = offsets < COUNT
    clean = tl.load(x0 + sample * COUNT + offsets, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.load(signal + sample), tl.load(sigma + sample)
    noise = noise_of(tl.load(keys + sample), first, BLOCK)
    tl.store(x + sample * COUNT + offsets, a * clean + b * noise, mask=inside)
    if TARGET == "velocity":
        noise = noise - clean
    elif TARGET == "v":
        noise = a * noise - b * clean
    tl.store(aim + sample * COUNT + offsets, noise, mask=inside)


@triton.jit
def error(
    output, target, weight, out, row,
    COUNT: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (chunks, B): each chunk's part of the weighted mean square of target - output, whose samples are ``row``
    apart. Grid: (B, chunks of CHUNK elements)."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        offsets = chunk * CHUNK + first + tl.arange(0, BLOCK)
        inside = offsets < COUNT
        given = tl.load(output + sample * row + offsets, mask=inside, other=0.0).to(tl.float32)
        difference = tl.load(target + sample * COUNT + offsets, mask=inside, other=0.0).to(tl.float32) - given
        total += difference * difference
    mean = tl.sum(total, 0) / COUNT
    if WEIGHTED:
        mean = mean * tl.load(weight + sample)
    tl.store(out + chunk * tl.num_programs(0) + sample, mean)


@triton.jit
def error_backward(
    output, target, weight, grad, out, row, COUNT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out (B, COUNT): the gradient of output from ``grad`` (B,), that of the errors. Grid: (B, blocks)."""
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < COUNT
    given = tl.load(output + sample * row + offsets, mask=inside, other=0.0).to(tl.float32)
    difference = given - tl.load(target + sample * COUNT + offsets, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + sample) * 2.0 / COUNT
    if WEIGHTED:
        slope = slope * tl.load(weight + sample)
    tl.store(out + sample * COUNT + offsets, (slope * difference).to(out.dtype.element_ty), mask=inside)
