"""Which DeepSpeed dicts are taken by DeepSpeed 0.19 for sure, so that a dry run need not import it to ask.

Only everyday keys with values of their everyday kinds count; about anything else DeepSpeed itself is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Judge = Callable[[Any], bool]


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < float("inf")


def _one_of(*values: Any) -> Judge:
    return lambda value: any(value is own or (type(value) is type(own) and value == own) for own in values)


# fmt: off
OFFLOAD: dict[str, Judge] = {"device": _one_of("none", "cpu"), "pin_memory": _flag, "buffer_count": _count}
# What each block may hold; a plain judge is a top-level key's.
PLAIN: dict[str, Judge | dict[str, Judge | dict[str, Judge]]] = {
    **dict.fromkeys((
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print",
    ), _count),
    **dict.fromkeys((
        "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "wall_clock_breakdown", "dump_state",
    ), _flag),
    "gradient_clipping": _size,
    "communication_data_type": _one_of("fp32", "bf16", "fp16"),
    "bf16": {"enabled": _flag},
    "fp16": {
        "enabled": _flag, "loss_scale": _size, "initial_scale_power": _count, "loss_scale_window": _count,
        "hysteresis": _count, "min_loss_scale": _count,
    },
    "data_types": {"grad_accum_dtype": _one_of("fp32", "bf16", "fp16")},
    # Of the pipeline: what megadit itself writes.
    "pipeline": {
        "pipe_partitioned": _one_of(False), "grad_partitioned": _one_of(False),
        "activation_checkpoint_interval": _one_of(0),
    },
    "zero_optimization": {
        "stage": _one_of(0, 1, 2, 3),
        **dict.fromkeys((
            "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        ), _count),
        **dict.fromkeys((
            "contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm",
            "round_robin_gradients", "memory_efficient_linear", "stage3_gather_16bit_weights_on_model_save",
        ), _flag),
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
    },
}
# fmt: on


def is_plain(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed takes the merged dict for sure; False where only DeepSpeed knows."""
    return _fits(ds_config, PLAIN)


def _fits(value: Any, judge: Judge | Mapping[str, Any]) -> bool:
    if not isinstance(judge, Mapping):
        return judge(value)
    return isinstance(value, Mapping) and all(key in judge and _fits(own, judge[key]) for key, own in value.items())
