"""Reads a DeepSpeed configuration file, removes ``"auto"`` values and refuses what megadit cannot run.

DeepSpeed ignores unknown top-level keys without a word; here each is a warning. Unknown ZeRO keys, for which DeepSpeed
raises a traceback, are errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadit.config.loading.sources import display, find_config
from megadit.errors import UserError, did_you_mean
from megadit.files.json_text import JsonError, parse_json

AUTO = "auto"
# fmt: off
# Top-level keys that DeepSpeed 0.19 reads.
KNOWN_KEYS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})

# Keys of the zero_optimization block in DeepSpeed 0.19.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
    "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
})
# fmt: on

_REMOVED = "DeepSpeed 0.19 no longer has it; take it out"
_OWN_ORDER = "megadit numbers and feeds the samples itself; take it out"

# Blocks that are refused when enabled, and dropped when they have "enabled": false.
REFUSED_BLOCKS = {
    "amp": _REMOVED + " and set bf16 or fp16",
    "autotuning": "it would start trial runs of its own; take it out",
    "compression_training": _REMOVED,
    "curriculum_learning": _OWN_ORDER,
    "data_efficiency": _OWN_ORDER,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED + ": the global batch is train.global_batch",
    "expert_parallel": "megadit's models have no experts; take it out",
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "it is for generation with language models; take it out",
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": "AutoTP replaces layers and drops their muP multipliers without a word; take it out",
}

# Blocks that configure functions of DeepSpeed which megadit does not call.
IDLE_BLOCKS = {
    "activation_checkpointing": "has no effect on megadit's models; set train.activation_checkpointing",
    "compile": "has no effect on megadit's models; set train.compile",
}


@dataclass(frozen=True)
class DsFile:
    """A DeepSpeed configuration without ``"auto"`` values, its name in messages, and warnings for the user."""

    values: dict[str, Any]
    label: str
    warnings: tuple[str, ...] = ()

    def error(self, sentence: str) -> UserError:
        """An error about the file; its name is appended."""
        return UserError(f"{sentence} (in {self.label})")

    def block(self, name: str) -> dict[str, Any]:
        """The block ``name``, {} where it is missing. Raises UserError if it is no object."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(f"{name}: {json.dumps(value)} is not an object of keys and values")
        return value


def read_ds_config(ds: Mapping[str, Any] | str | Path | None) -> DsFile:
    """Read a DeepSpeed configuration: a JSON file, the dict it holds, or None for an empty one.

    Raises UserError for a missing or malformed file, an unknown ZeRO key, and blocks that megadit cannot run.
    """
    if ds is None:
        return DsFile({}, "ds_config")
    if isinstance(ds, Mapping):
        values, label = dict(ds), "ds_config"
    else:
        path = find_config(ds, option="--ds_config", suffix=".json")
        values, label = _read_json(path), display(path)
    values = _without_auto(values)
    if "bfloat16" in values:  # DeepSpeed's older name of the block
        values.setdefault("bf16", values.pop("bfloat16"))
    file = DsFile(values, label)
    _refuse_blocks(file)
    _check_zero(file)
    return replace(file, warnings=tuple(_unknown_keys(values, label)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes(), finite=True)
    except OSError as error:
        raise UserError(f"--ds_config: cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        hint = "; give a DeepSpeed JSON file" if str(error) == "is not a text file" else ""
        raise UserError(f"--ds_config: {display(path)} {error}{hint}") from None
    if not isinstance(values, dict):
        raise UserError(f"--ds_config: {display(path)} is not a JSON object; DeepSpeed files begin with {{")
    return values


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without those that are "auto": the run config sets them, or DeepSpeed's default applies."""
    explicit: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            explicit[key] = _without_auto(value)
        elif not (isinstance(value, str) and value == AUTO):
            explicit[key] = value
    return explicit


def _refuse_blocks(file: DsFile) -> None:
    values = file.values
    for name in [name for name in REFUSED_BLOCKS if name in values]:
        if _is_enabled(name, values[name]):
            raise file.error(f"{name}: {REFUSED_BLOCKS[name]}")
        del values[name]
    if values.get("sequence_parallel_size", 1) != 1:
        size = values["sequence_parallel_size"]
        raise file.error(f"sequence_parallel_size: {size} is not supported; take it out")
    if values.get("gradient_allreduce_op", "mean") != "mean":
        op = values["gradient_allreduce_op"]
        raise file.error(f"gradient_allreduce_op: {op} would scale gradients by the ranks; set mean")
    if values.get("managed_gradient_accumulation", True) is not True:
        raise file.error("managed_gradient_accumulation: false is not supported; take it out")


def _is_enabled(name: str, block: Any) -> bool:
    if not isinstance(block, dict):
        return bool(block)
    if name == "tensor_parallel":
        return block.get("autotp_size", 0) not in (0, 1)
    return bool(block.get("enabled", True))


def _unknown_keys(values: Mapping[str, Any], label: str) -> list[str]:
    warnings = []
    for key in values:
        if key in IDLE_BLOCKS:
            warnings.append(f"{key}: {IDLE_BLOCKS[key]} (in {label})")
        if key not in KNOWN_KEYS:
            hint = did_you_mean(key, KNOWN_KEYS, "it has no effect")
            warnings.append(f"{key}: DeepSpeed has no such key and ignores it; {hint} (in {label})")
    return warnings


def _check_zero(file: DsFile) -> None:
    zero = file.block("zero_optimization")
    for key in zero:
        if key not in ZERO_KEYS:
            hint = did_you_mean(key, ZERO_KEYS, "take it out")
            raise file.error(f"zero_optimization.{key}: DeepSpeed has no such key; {hint}")
    if zero.get("zenflow"):
        raise file.error("zero_optimization.zenflow: it replaces the optimizer's step, which is megadit's; take it out")
    if zero.get("compute_grad_norm", True) is not True:
        raise file.error("zero_optimization.compute_grad_norm: false, but megadit logs the norm; take it out")
    for name, what in (("offload_optimizer", "the master weights"), ("offload_param", "the weights")):
        block = zero.get(name)
        if isinstance(block, dict) and block.get("device") == "nvme":
            raise file.error(
                f"zero_optimization.{name}.device: nvme swaps out {what} that checkpoints are made from and restored "
                f"to; set cpu"
            )
    offload = zero.get("offload_optimizer")
    for key, plain in (("ratio", 1.0), ("super_offload", False)):
        if isinstance(offload, dict) and offload.get(key, plain) != plain:
            raise file.error(
                f"zero_optimization.offload_optimizer.{key}: {json.dumps(offload[key])} hands a part of the update to "
                f"an optimizer of DeepSpeed's own, which has not muP's learning rates; take it out"
            )


def offloads_optimizer(zero: Mapping[str, Any]) -> bool:
    """Whether the ``zero_optimization`` block keeps master weights and moments on the CPU."""
    block = zero.get("offload_optimizer")
    return _offloads(block) if isinstance(block, dict) else bool(zero.get("cpu_offload"))


def offloads_parameters(zero: Mapping[str, Any]) -> bool:
    """Whether the ``zero_optimization`` block keeps the weights on the CPU."""
    return _offloads(zero.get("offload_param"))


def _offloads(block: Any) -> bool:
    return isinstance(block, dict) and block.get("device", "none") not in (None, "none")


Predicate = Callable[[Any], bool]


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < float("inf")


def _one_of(*values: Any) -> Predicate:
    return lambda value: any(value is known or (type(value) is type(known) and value == known) for known in values)


# fmt: off
OFFLOAD: dict[str, Predicate] = {"device": _one_of("none", "cpu"), "pin_memory": _is_flag, "buffer_count": _is_count}
# Keys and values that DeepSpeed is known to take: a predicate for each key, nested as the blocks are.
KNOWN_VALID: dict[str, Predicate | dict[str, Predicate | dict[str, Predicate]]] = {
    **dict.fromkeys((
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print",
    ), _is_count),
    **dict.fromkeys((
        "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "wall_clock_breakdown", "dump_state",
    ), _is_flag),
    "gradient_clipping": _is_size,
    "communication_data_type": _one_of("fp32", "bf16", "fp16"),
    "bf16": {"enabled": _is_flag},
    "fp16": {
        "enabled": _is_flag, "loss_scale": _is_size, "initial_scale_power": _is_count, "loss_scale_window": _is_count,
        "hysteresis": _is_count, "min_loss_scale": _is_count,
    },
    "data_types": {"grad_accum_dtype": _one_of("fp32", "bf16", "fp16")},
    # The values that megadit itself writes.
    "pipeline": {
        "pipe_partitioned": _one_of(False), "grad_partitioned": _one_of(False),
        "activation_checkpoint_interval": _one_of(0),
    },
    "zero_optimization": {
        "stage": _one_of(0, 1, 2, 3),
        **dict.fromkeys((
            "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        ), _is_count),
        **dict.fromkeys((
            "contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm",
            "round_robin_gradients", "memory_efficient_linear", "stage3_gather_16bit_weights_on_model_save",
        ), _is_flag),
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
    },
}
# fmt: on


def is_known_valid(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed certainly accepts the merged dict; False where only DeepSpeed itself can tell."""
    return _fits(ds_config, KNOWN_VALID)


def _fits(value: Any, known: Predicate | Mapping[str, Any]) -> bool:
    if not isinstance(known, Mapping):
        return known(value)
    return isinstance(value, Mapping) and all(key in known and _fits(entry, known[key]) for key, entry in value.items())
