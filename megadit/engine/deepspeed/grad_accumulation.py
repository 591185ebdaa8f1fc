"""Accumulation of bf16 gradients in float32 at ZeRO stage 1, by DeepSpeed's ZeRO optimizer.

DeepSpeed 0.19 selects another wrapper only for this case, ``BF16_Optimizer``: it keeps bf16 gradients of all parameters
beside the float32 ones, and has no norms of groups. Its ZeRO optimizer accumulates in float32 too, which DeepSpeed uses
when the state is offloaded: a hook on each parameter adds a micro batch's gradient to ``grad_accum``, float32, and
frees it, and at the end of a step ``grad_accum`` is reduced. So everything that works on its buffers (``zero_stages``)
holds for this case, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def force_zero_optimizer() -> Iterator[None]:
    """Inside the block engines are created with the ZeRO optimizer where DeepSpeed would select ``BF16_Optimizer``."""
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    original = DeepSpeedEngine._do_optimizer_sanity_check

    def _do_optimizer_sanity_check(engine: Any, optimizer: Any) -> Any:
        wrapper = original(engine, optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 else wrapper

    DeepSpeedEngine._do_optimizer_sanity_check = _do_optimizer_sanity_check
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = original
