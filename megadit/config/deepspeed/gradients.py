"""Gradient accumulation and reduction: their data types, and the size of ZeRO's reduction buffers.

A sum in bf16 has 8 bits of precision: after some micro batches, a gradient is smaller than the sum's rounding error and
lost. So under bf16 the gradients of several micro batches are accumulated in float32, as in Megatron-LM, unless the
DeepSpeed file says otherwise. At ZeRO stage 1 replicas reduce that float32 sum once per step. At stages 2 and 3 they
reduce the gradients of every micro batch, in the type in which these were computed.

DeepSpeed's default reduction buckets of 5e8 elements are 1 to 4 GB on every rank, however small the model. Where the
DeepSpeed file does not give ``reduce_bucket_size``, megadit sets it to the number of parameters of a rank, at most 5e8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megadit.config.deepspeed.file import DsFile, offloads_optimizer
from megadit.config.schema.run import RunConfig

_NAMES = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
}
_BUCKET = 5 * 10**8  # elements; DeepSpeed's default
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def accumulation_keys(file: DsFile, config: RunConfig, micro_batches: int) -> dict[str, Any]:
    """Keys of DeepSpeed's dict for gradient accumulation in a step of ``micro_batches``, from the file or by default.

    Raises UserError for a type that DeepSpeed does not have, and for a 16-bit type other than the gradients'.
    """
    requested, precision = file.block("data_types").get("grad_accum_dtype"), config.train.weights_precision
    dtype = _dtype_name(requested)
    if requested is not None and dtype is None:
        raise file.error(
            f"data_types.grad_accum_dtype: {json.dumps(requested)} is not a type of DeepSpeed's; write fp32, bf16 or "
            "fp16"
        )
    if dtype not in (None, "fp32", precision):
        raise file.error(
            f"data_types.grad_accum_dtype: {requested} would round the gradients of train.precision: {precision} once "
            "more; leave it out, or write fp32"
        )
    if precision != "bf16" or dtype == "bf16" or (dtype is None and not _accumulates(config, micro_batches)):
        return {}
    keys: dict[str, Any] = {"data_types": {**file.block("data_types"), "grad_accum_dtype": "fp32"}}
    if config.parallel.zero_stage == 1 and file.values.get("communication_data_type") is None:
        keys["communication_data_type"] = "fp32"
    return keys


def accumulation_warnings(file: DsFile, config: RunConfig, micro_batches: int) -> list[str]:
    """The warning for a file that asks for accumulation in bf16."""
    requested = file.block("data_types").get("grad_accum_dtype")
    in_bf16 = config.train.weights_precision == _dtype_name(requested) == "bf16"
    if not in_bf16 or not _accumulates(config, micro_batches):
        return []
    return [
        f"data_types.grad_accum_dtype: {requested} adds up the gradients of {micro_batches} micro batches in 16 bits, "
        f"where small ones are lost; leave it out for float32 (in {file.label})"
    ]


def _dtype_name(written: Any) -> str | None:
    return next((dtype for dtype, names in _NAMES.items() if written in names), None)


def _accumulates(config: RunConfig, micro_batches: int) -> bool:
    return micro_batches > 1 or config.parallel.pipeline > 1


def gradient_bytes(ds_config: Mapping[str, Any], precision: str) -> tuple[int, int]:
    """Bytes per element of (accumulated gradients, gradients that replicas reduce)."""
    working = _BYTES[precision]
    accumulated = _BYTES.get(str(_dtype_name((ds_config.get("data_types") or {}).get("grad_accum_dtype"))), working)
    return accumulated, _BYTES.get(str(ds_config.get("communication_data_type")).lower(), working)


def with_bucket(ds_config: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """``ds_config`` with ``reduce_bucket_size`` set for a rank of so many parameters, unless it is given."""
    zero = {"reduce_bucket_size": max(1, min(parameters, _BUCKET)), **ds_config["zero_optimization"]}
    return {**ds_config, "zero_optimization": zero}


def bucket_bytes(ds_config: Mapping[str, Any], parameters: int, precision: str, pipeline: bool) -> float:
    """Bytes of the reduction buffers of a rank of so many parameters, as DeepSpeed 0.19 allocates them.

    One at stages 1 to 3, and at 1 and 2 a second one: to fill while the first is reduced (``overlap_comm``), or in
    pipelines, which overlap nothing, in the type of the reduction.
    """
    zero = with_bucket(ds_config, parameters)["zero_optimization"]
    stage = int(zero["stage"])
    # With offload at stages 1 and 2 DeepSpeed ignores ``contiguous_gradients``.
    contiguous = zero.get("contiguous_gradients", True) or (stage < 3 and offloads_optimizer(zero))
    if stage == 0 or not contiguous:
        return 0.0
    accumulated, reduced = gradient_bytes(ds_config, precision)
    working = gradient_bytes({}, precision)[0]
    size = int(zero["reduce_bucket_size"])
    if stage == 3:
        return float(size * reduced)
    first = accumulated if stage == 1 else working
    return float(size * (first + (reduced if pipeline else first if zero.get("overlap_comm") else 0)))
