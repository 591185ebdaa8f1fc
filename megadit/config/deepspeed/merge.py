"""Merges a DeepSpeed file into a run configuration, so that the two cannot disagree.

A value that the file leaves out, or gives as "auto", is set from the run configuration. An explicit value wins over the
configuration's default, and is an error where it contradicts a key that the user set. The result is the updated run
configuration and the complete dict for ``deepspeed.initialize``. Written against DeepSpeed 0.19, which is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from megadit.config.deepspeed.batch import BatchPlan, BatchSize, data_parallel_size, nearest_layout, plan_batch
from megadit.config.deepspeed.file import DsFile, offloads_optimizer, offloads_parameters, read_ds_config
from megadit.config.deepspeed.gradients import accumulation_keys, accumulation_warnings
from megadit.config.deepspeed.translate import RequestedValue, requested_values
from megadit.config.loading.loader import LoadedConfig, replace
from megadit.config.schema.reads import check_deferred
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError

_NEVER = 10**9  # steps between DeepSpeed's progress lines: megadit prints its own
_GPU_OPTIMIZERS = ("fused", "apex", "deepspeed-fused")  # optim.implementation
_UNKNOWN_TO_DEEPSPEED = ("fused", "apex")  # by their classes: ZeRO would refuse them as untested
_MICRO_BATCHES_PER_STAGE = 4  # default; the pipeline bubble is at most a fifth of a step


@dataclass(frozen=True)
class MergedConfig:
    """The run configuration with batch sizes and ZeRO stage resolved, DeepSpeed's dict, and warnings for the user."""

    config: RunConfig
    ds_config: dict[str, Any]
    warnings: tuple[str, ...] = ()


def merge_ds_config(loaded: LoadedConfig, ds: Mapping[str, Any] | str | Path | None, world_size: int) -> MergedConfig:
    """Merge the DeepSpeed file ``ds`` (path, dict, or None) into ``loaded`` for ``world_size`` processes.

    In the result ``train.global_batch``, ``train.micro_batch``, ``parallel.zero_stage`` and all that the file's
    optimizer, scheduler, precision and clipping set are concrete, and ``ds_config`` agrees with them.

    Raises UserError where the file contradicts a key that the user set (it names both keys and values), where batch
    sizes do not multiply up, and for settings that would break muP or megadit's optimizer.
    """
    file = read_ds_config(ds)
    changes = resolve_conflicts(list(requested_values(file, loaded.config)), loaded, file)
    if changes.get("optim.schedule", "wsd") != "wsd" and "optim.decay_steps" not in loaded.user_set:
        changes["optim.decay_steps"] = None  # the default schedule's, which the file replaces
    config = replace(loaded.config, changes, source=file.label)
    plan = _plan(file, loaded, config, world_size)
    stage = _zero_stage(config, world_size)
    resolved = {
        "train.global_batch": plan.global_batch,
        "train.micro_batch": plan.micro_batch,
        "parallel.zero_stage": stage,
    }
    config = replace(config, resolved | _offload_changes(file, loaded, config), source=file.label)
    check_deferred(
        {"optim.schedule": config.optim.schedule, "optim.min_lr_ratio": config.optim.min_lr_ratio},
        {key: source for key, source in loaded.user_set.items() if key not in loaded.resolved},
    )
    warnings = [*file.warnings, *accumulation_warnings(file, config, plan.accumulation)]
    if stage == 0 and offloads_optimizer(file.block("zero_optimization")):
        warnings.append(
            f"zero_optimization.offload_optimizer: has no effect at ZeRO stage 0; set stage 1, 2 or 3 (in {file.label})"
        )
    if stage < 3 and offloads_parameters(file.block("zero_optimization")):
        warnings.append(
            f"zero_optimization.offload_param: has no effect at ZeRO stage {stage}; set stage 3 (in {file.label})"
        )
    return MergedConfig(config, _ds_dict(file, config, plan), tuple(warnings))


def resolve_conflicts(requests: list[RequestedValue], loaded: LoadedConfig, file: DsFile) -> dict[str, Any]:
    """The requested values as changes of the run config. Raises UserError that lists all contradictions."""
    conflicts = []
    for request in requests:
        by_epochs = request.key == "train.steps" and loaded.config.train.epochs is not None
        key = "train.epochs" if by_epochs else request.key
        present = attrgetter(key)(loaded.config)
        if _is_user_set(key, present, loaded) and (key != request.key or not _same(present, request.value)):
            conflicts.append(_conflict(key, present, loaded, request.ds_key, request.ds_value, file))
    if conflicts:
        raise UserError("\n".join(conflicts))
    return {request.key: request.value for request in requests}


def _is_user_set(key: str, present: Any, loaded: LoadedConfig) -> bool:
    # null in these keys means "choose for me": it contradicts nothing.
    unset = present is None and key in ("parallel.zero_stage", "train.micro_batch", "train.epochs", "train.steps")
    automatic = key == "optim.implementation" and present == "auto"
    return key in loaded.user_set and not unset and not automatic


def _conflict(key: str, value: Any, loaded: LoadedConfig, ds_key: str, ds_value: Any, file: DsFile) -> str:
    return (
        f"{key}: {_shown(value)} (in {loaded.user_set[key]}) contradicts {ds_key}: {_shown(ds_value)} "
        f'(in {file.label}); remove one of them, or write "auto" in the DeepSpeed file'
    )


def _plan(file: DsFile, loaded: LoadedConfig, config: RunConfig, world_size: int) -> BatchPlan:
    total = _requested_size("train.global_batch", "train_batch_size", file, loaded)
    micro = _requested_size("train.micro_batch", "train_micro_batch_size_per_gpu", file, loaded)
    accumulation = _ds_size("gradient_accumulation_steps", file)
    stages = config.parallel.pipeline

    def plan_for(replicas: int) -> BatchPlan:
        default_micro = config.train.micro_batch
        if stages > 1 and default_micro is None:
            default_micro = max(config.train.global_batch // (replicas * _MICRO_BATCHES_PER_STAGE * stages), 1)
        return plan_batch(
            replicas,
            ranks_per_replica=world_size // replicas,
            global_batch=total,
            micro_batch=micro,
            accumulation=accumulation,
            default_global=BatchSize(config.train.global_batch, "train.global_batch", "a default"),
            default_micro=default_micro,
        )

    def fits(replicas: int) -> bool:
        try:
            plan_for(replicas)
        except UserError:
            return False
        return True

    replicas = data_parallel_size(config, world_size, fits)
    try:
        return plan_for(replicas)
    except UserError as error:
        layout = nearest_layout(config, world_size, fits)
        raise UserError(f"{error}, or the layout {layout}" if layout else str(error)) from None


def _requested_size(key: str, ds_key: str, file: DsFile, loaded: LoadedConfig) -> BatchSize | None:
    """A batch size that the user or the file requests. Raises UserError if they request different ones."""
    present = attrgetter(key)(loaded.config)
    of_user = BatchSize(present, key, f"in {loaded.user_set[key]}") if _is_user_set(key, present, loaded) else None
    of_file = _ds_size(ds_key, file)
    if of_user is not None and of_file is not None and of_user.value != of_file.value:
        raise UserError(_conflict(key, of_user.value, loaded, ds_key, of_file.value, file))
    return of_user or of_file


def _ds_size(ds_key: str, file: DsFile) -> BatchSize | None:
    value = file.values.get(ds_key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise file.error(f'{ds_key}: {_shown(value)} is not a whole number of at least 1, or "auto"')
    return BatchSize(value, ds_key, f"in {file.label}")


def _zero_stage(config: RunConfig, world_size: int) -> int:
    stage = config.parallel.zero_stage
    if stage is not None:
        return stage
    # One process has nothing to shard, but bf16 and fp16 need ZeRO's float32 master weights.
    return 0 if world_size == 1 and config.train.weights_precision == "fp32" else 1


def _offload_changes(file: DsFile, loaded: LoadedConfig, config: RunConfig) -> dict[str, Any]:
    """The change of ``optim.implementation`` that optimizer offload requires."""
    if not offloads_optimizer(file.block("zero_optimization")):
        return {}
    present = config.optim.implementation
    if present in _GPU_OPTIMIZERS:
        raise file.error(
            f"optim.implementation: {present} steps on the GPU, but zero_optimization.offload_optimizer keeps the "
            "state on the CPU; set optim.implementation=auto or deepspeed-cpu"
        )
    if file.values.get("zero_force_ds_cpu_optimizer") is not True or present == "deepspeed-cpu":
        return {}
    if _is_user_set("optim.implementation", present, loaded):
        raise UserError(_conflict("optim.implementation", present, loaded, "zero_force_ds_cpu_optimizer", True, file))
    return {"optim.implementation": "deepspeed-cpu"}


def _ds_dict(file: DsFile, config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's complete dict: the keys that megadit decides, and the other keys of the file unchanged."""
    precision, clip = config.train.weights_precision, config.optim.clip
    merged: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # Always written out: DeepSpeed 0.19 clips at 1.0 when the key is absent. megadit clips per group itself.
        "gradient_clipping": float((clip.mode == "global" and clip.value) or 0.0),
        "zero_optimization": _zero_block(file, config),
        "bf16": {**file.block("bf16"), "enabled": precision == "bf16"},
        "fp16": {**file.block("fp16"), "enabled": precision == "fp16"},
        "steps_per_print": _NEVER,
        **accumulation_keys(file, config, plan.accumulation),
    }
    if config.parallel.pipeline > 1:
        # With partitioned activations a stage may send one tensor only; megadit recomputes blocks itself.
        off = {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0}
        merged["pipeline"] = {**file.block("pipeline"), **off}
    if offloads_optimizer(file.block("zero_optimization")):
        merged["zero_force_ds_cpu_optimizer"] = config.optim.implementation == "deepspeed-cpu"
    if config.optim.implementation in _UNKNOWN_TO_DEEPSPEED:
        merged["zero_allow_untested_optimizer"] = True
    decided = {*merged, "optimizer", "scheduler"} - {"steps_per_print"}
    return merged | {key: value for key, value in file.values.items() if key not in decided}


def _zero_block(file: DsFile, config: RunConfig) -> dict[str, Any]:
    zero = {**file.block("zero_optimization"), "stage": config.parallel.zero_stage}
    if config.train.activation_checkpointing == "selective" and config.parallel.zero_stage == 3:
        if zero.get("memory_efficient_linear"):
            raise file.error(
                "zero_optimization.memory_efficient_linear: true adds biases in place, which does not go with "
                "train.activation_checkpointing: selective; take it out, or set full"
            )
        zero["memory_efficient_linear"] = False
    return zero


def _same(one: Any, other: Any) -> bool:
    return tuple(one) == tuple(other) if isinstance(one, (tuple, list)) else bool(one == other)


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
