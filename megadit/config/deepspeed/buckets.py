"""The buffers in which DeepSpeed's ZeRO collects gradients before replicas sum them.

DeepSpeed's own size of 5e8 elements is 1 to 4 GB on every rank, however small the model. Where the DeepSpeed file does
not say ``reduce_bucket_size``, megadit takes what the parameters of a rank fill, up to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadit.config.deepspeed.grad_accumulation import gradient_bytes
from megadit.config.deepspeed.offload import offloads_optimizer

_MOST = 5 * 10**8  # DeepSpeed's own


def with_bucket(ds_config: Mapping[str, Any], held: int) -> dict[str, Any]:
    """``ds_config`` for a rank that holds ``held`` parameters, its bucket's size written out."""
    zero = {"reduce_bucket_size": max(1, min(held, _MOST)), **ds_config["zero_optimization"]}
    return {**ds_config, "zero_optimization": zero}


def bucket_bytes(ds_config: Mapping[str, Any], held: int, precision: str, pipeline: bool) -> float:
    """Bytes of all such buffers of a rank that holds ``held`` parameters, as DeepSpeed 0.19 allocates them.

    One at stages 1 to 3, and at 1 and 2 a second to fill while the first is sent (``overlap_comm``), or to send from in
    pipelines, which overlap nothing.
    """
    zero = with_bucket(ds_config, held)["zero_optimization"]
    stage = int(zero["stage"])
    # Offload at stages 1 and 2 has them whatever the file says.
    contiguous = zero.get("contiguous_gradients", True) or (stage < 3 and offloads_optimizer(zero))
    if stage == 0 or not contiguous:
        return 0.0
    added, sent = gradient_bytes(ds_config, precision)
    working = gradient_bytes({}, precision)[0]
    size = int(zero["reduce_bucket_size"])
    if stage == 3:
        return float(size * sent)
    first = added if stage == 1 else working
    return float(size * (first + (sent if pipeline else first if zero.get("overlap_comm") else 0)))
