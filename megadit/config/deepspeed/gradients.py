"""Gradients of a step: in which type they are added up, in which replicas send the sums, and through which buffers.

A sum in bf16 keeps 8 bits: of many micro batches each is soon smaller than what the sum is rounded to, and is lost. So
under bf16 gradients of several micro batches are added up in float32, as by Megatron-LM, unless the DeepSpeed file says
otherwise. At ZeRO stage 1 replicas send such a sum once, as it is. At stages 2 and 3 they send the gradients of every
micro batch, in the type in which these were computed.

DeepSpeed's own buffers of 5e8 elements, in which ZeRO collects gradients before replicas sum them, are 1 to 4 GB on
every rank, however small the model. Where the DeepSpeed file does not say ``reduce_bucket_size``, megadit takes what
the parameters of a rank fill, up to that.
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
_BUCKET = 5 * 10**8  # elements; DeepSpeed's own
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def accumulation_keys(file: DsFile, config: RunConfig, micro_batches: int) -> dict[str, Any]:
    """The keys of DeepSpeed's dict that say so for a step of ``micro_batches``: what the file says, or megadit chooses.

    Raises UserError for a type that DeepSpeed does not know, and for 16 bits that are not those of the gradients.
    """
    told, precision = file.block("data_types").get("grad_accum_dtype"), config.train.precision
    kind = _kind(told)
    if told is not None and kind is None:
        raise file.error(
            f"data_types.grad_accum_dtype: {json.dumps(told)} is not a type of DeepSpeed's; write fp32, bf16 or fp16"
        )
    if kind not in (None, "fp32", precision):
        raise file.error(
            f"data_types.grad_accum_dtype: {told} would round the gradients of train.precision: {precision} once more; "
            f"leave it out, or write fp32"
        )
    if precision != "bf16" or kind == "bf16" or (kind is None and not _adds_up(config, micro_batches)):
        return {}
    keys: dict[str, Any] = {"data_types": {**file.block("data_types"), "grad_accum_dtype": "fp32"}}
    if config.parallel.zero_stage == 1 and file.values.get("communication_data_type") is None:
        keys["communication_data_type"] = "fp32"
    return keys


def accumulation_warnings(file: DsFile, config: RunConfig, micro_batches: int) -> list[str]:
    """What to tell of a file that asks for sums in 16 bits under bf16."""
    told = file.block("data_types").get("grad_accum_dtype")
    if config.train.precision != "bf16" or _kind(told) != "bf16" or not _adds_up(config, micro_batches):
        return []
    return [
        f"data_types.grad_accum_dtype: {told} adds up the gradients of {micro_batches} micro batches in 16 bits, where "
        f"small ones are lost; leave it out for float32 (in {file.label})"
    ]


def _kind(told: Any) -> str | None:
    return next((kind for kind, names in _NAMES.items() if told in names), None)


def _adds_up(config: RunConfig, micro_batches: int) -> bool:
    return micro_batches > 1 or config.parallel.pipeline > 1


def gradient_bytes(ds_config: Mapping[str, Any], precision: str) -> tuple[int, int]:
    """Bytes of an element: of the gradients that are added up, and of what replicas send of them."""
    working = _BYTES[precision]
    added = _BYTES.get(str(_kind((ds_config.get("data_types") or {}).get("grad_accum_dtype"))), working)
    return added, _BYTES.get(str(ds_config.get("communication_data_type")).lower(), working)


def with_bucket(ds_config: Mapping[str, Any], held: int) -> dict[str, Any]:
    """``ds_config`` for a rank that holds ``held`` parameters, its bucket's size written out."""
    zero = {"reduce_bucket_size": max(1, min(held, _BUCKET)), **ds_config["zero_optimization"]}
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
