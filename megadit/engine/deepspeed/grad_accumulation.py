"""Float32 sums of bf16 gradients at ZeRO stage 1. With ``partitions`` the door to DeepSpeed's internals.

DeepSpeed 0.19 takes another wrapper there than for every other run, ``BF16_Optimizer``: it keeps bf16 gradients of all
parameters beside the float32 ones, and knows no norm of a group. Yet its ZeRO optimizer does such sums too, and is
taken for them where the state is offloaded: a hook on each parameter adds a micro batch's gradient to ``grad_accum``,
float32, and drops it, and at the end of a step it is ``grad_accum`` that is reduced. So the ZeRO optimizer is taken
here, and whatever is built on its buffers stays true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def force_zero_optimizer() -> Iterator[None]:
    """While it lasts engines are made with the ZeRO optimizer where DeepSpeed would take ``BF16_Optimizer``."""
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    plain = DeepSpeedEngine._do_optimizer_sanity_check

    def _do_optimizer_sanity_check(engine: Any, optimizer: Any) -> Any:
        wrapper = plain(engine, optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 else wrapper

    DeepSpeedEngine._do_optimizer_sanity_check = _do_optimizer_sanity_check
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = plain
