"""The Triton kernel of AdamW: each element of each operand is read once and written once.

A program updates ``BLOCK`` elements of one segment, of which a table on the device holds the addresses: so segments of
many tensors are updated by one launch. Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table, 8 bytes each: addresses, sizes, and float32 scalars in their lower halves.
FIELDS = (
    "master",
    "exp_avg",
    "exp_avg_sq",
    "gradient",
    "copy",
    "size",
    "first_program",
    "aligned",
    "step",
    "new_step",
    "scale",
    "lr",
    "decay",
    "eps",
)
BLOCK = 1024  # elements of a program: 8 per thread of 4 warps, 16 bytes of bfloat16

_MASTER: tl.constexpr = tl.constexpr(FIELDS.index("master"))
_EXP_AVG: tl.constexpr = tl.constexpr(FIELDS.index("exp_avg"))
_EXP_AVG_SQ: tl.constexpr = tl.constexpr(FIELDS.index("exp_avg_sq"))
_GRADIENT: tl.constexpr = tl.constexpr(FIELDS.index("gradient"))
_COPY: tl.constexpr = tl.constexpr(FIELDS.index("copy"))
_SIZE: tl.constexpr = tl.constexpr(FIELDS.index("size"))
_FIRST_PROGRAM: tl.constexpr = tl.constexpr(FIELDS.index("first_program"))
_ALIGNED: tl.constexpr = tl.constexpr(FIELDS.index("aligned"))
_STEP: tl.constexpr = tl.constexpr(FIELDS.index("step"))
_NEW_STEP: tl.constexpr = tl.constexpr(FIELDS.index("new_step"))
_SCALE: tl.constexpr = tl.constexpr(FIELDS.index("scale"))
_LR: tl.constexpr = tl.constexpr(FIELDS.index("lr"))
_DECAY: tl.constexpr = tl.constexpr(FIELDS.index("decay"))
_EPS: tl.constexpr = tl.constexpr(FIELDS.index("eps"))
_FIELDS: tl.constexpr = tl.constexpr(len(FIELDS))


@triton.jit
def _float(field):
    return tl.load(field).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _correction(count, log_beta):
    """1 - beta^count, to float32's precision where it is small: 1 - 0.999 would lose 5 digits."""
    x = count * log_beta
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    series = 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series)))
    return tl.where(x > -0.4, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _update_elements(
    master,
    exp_avg,
    exp_avg_sq,
    gradient,
    copy,
    offsets,
    inside,
    scale,
    lr,
    decay,
    eps,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    correction1,
    root2,
    COPY: tl.constexpr,
):
    """Update the elements at ``offsets``, or those of them ``inside``; rounded as torch's fused AdamW rounds."""
    g = tl.load(gradient + offsets, mask=inside).to(tl.float32) * scale
    m = beta1 * tl.load(exp_avg + offsets, mask=inside) + one_minus_beta1 * g
    v = beta2 * tl.load(exp_avg_sq + offsets, mask=inside) + one_minus_beta2 * g * g
    p = tl.load(master + offsets, mask=inside)
    p = p - decay * p
    denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps
    p = p - tl.div_rn(lr / correction1 * m, denominator)
    tl.store(master + offsets, p, mask=inside)
    tl.store(exp_avg + offsets, m, mask=inside)
    tl.store(exp_avg_sq + offsets, v, mask=inside)
    if COPY is not None:
        tl.store(copy + offsets, p.to(COPY), mask=inside)


@triton.jit
def update(
    table,
    segment_of_program,
    gate,
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the segments of ``table`` (segments, fields) int64. Grid: the blocks of all segments, in their order.

    segment_of_program: (programs,) int32.  gate: float32, not 0 where nothing may change, or None.  GRADIENT, COPY:
    types of the elements; COPY is None where no copy is written.
    """
    program = tl.program_id(0)
    entry = table + tl.load(segment_of_program + program).to(tl.int64) * _FIELDS
    start = (program - tl.load(entry + _FIRST_PROGRAM)) * BLOCK
    size = tl.load(entry + _SIZE)
    applied = 1.0
    if gate is not None:
        applied = tl.where(tl.load(gate) == 0.0, 1.0, 0.0)
        size = tl.where(applied == 0.0, 0, size)  # no lane is active

    step = tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)))
    new_step = tl.load(entry + _NEW_STEP)
    if (new_step != 0) & (start == 0):  # of a buffer its first segment counts, into memory that no program reads
        tl.store(new_step.to(tl.pointer_type(tl.float32)), step + applied)
    correction1 = _correction(step + 1.0, log_beta1)
    root2 = tl.sqrt_rn(_correction(step + 1.0, log_beta2))
    scale_address = tl.load(entry + _SCALE)
    scale = 1.0
    if scale_address != 0:
        scale = tl.load(scale_address.to(tl.pointer_type(tl.float32)))
    lr = _float(entry + _LR)
    decay = _float(entry + _DECAY)
    eps = _float(entry + _EPS)

    master = tl.load(entry + _MASTER).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(entry + _EXP_AVG).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(entry + _EXP_AVG_SQ).to(tl.pointer_type(tl.float32))
    gradient = tl.load(entry + _GRADIENT).to(tl.pointer_type(GRADIENT))
    copy = tl.load(entry + _COPY).to(tl.pointer_type(tl.float32 if COPY is None else COPY))
    offsets = start + tl.arange(0, BLOCK)
    if (tl.load(entry + _ALIGNED) != 0) & (start + BLOCK <= size):
        # Only here, with addresses known to be aligned and without a mask, do accesses become 16 bytes wide.
        master = tl.multiple_of(master, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        gradient = tl.multiple_of(gradient, 16)
        copy = tl.multiple_of(copy, 16)
        # fmt: off
        _update_elements(master, exp_avg, exp_avg_sq, gradient, copy, offsets, None, scale, lr, decay, eps,
                         beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, root2, COPY)
    else:
        _update_elements(
            master,
            exp_avg,
            exp_avg_sq,
            gradient,
            copy,
            offsets,
            offsets < size,
            scale,
            lr,
            decay,
            eps,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            correction1,
            root2,
            COPY,
        )
        # fmt: on
