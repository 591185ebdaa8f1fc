"""Translates a DeepSpeed file into keys of the run configuration.

megadit gives DeepSpeed its own optimizer and sets the learning rates itself, so the file's optimizer and scheduler
blocks are translated into ``optim.*``, or refused where they would change muP's ratios between parameter groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megadit.config.deepspeed.file import DsFile, offloads_optimizer
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError, did_you_mean


@dataclass(frozen=True)
class RequestedValue:
    """A run key and the value that the file requests for it, by ``ds_value`` at ``ds_key``."""

    key: str
    value: Any
    ds_key: str
    ds_value: Any


def requested_values(file: DsFile, config: RunConfig) -> Iterator[RequestedValue]:
    """All requests of ``file`` but the batch sizes. Raises UserError for what megadit cannot do."""
    yield from _precision(file, config)
    yield from _stage(file)
    yield from _clipping(file, config)
    yield from _optimizer(file, config)
    yield from _scheduler(file)


def _precision(file: DsFile, config: RunConfig) -> Iterator[RequestedValue]:
    flags = {name: file.block(name).get("enabled") for name in ("bf16", "fp16")}
    for name, flag in flags.items():
        if flag not in (None, True, False):
            raise file.error(f"{name}.enabled: {json.dumps(flag)} is not true or false")
        if file.block(name).get(f"{name}_master_weights_and_grads"):
            raise file.error(
                f"{name}.{name}_master_weights_and_grads: true leaves no float32 master weights, which training under "
                f"muP and checkpoints need; take it out"
            )
    if file.block("fp16").get("auto_cast"):
        raise file.error(
            "fp16.auto_cast: true rounds timesteps to half precision on their way into the model, which casts its own "
            "inputs; take it out"
        )
    if flags["bf16"] and flags["fp16"]:
        raise file.error("bf16.enabled: true and fp16.enabled: true exclude each other; keep one")
    for name, flag in flags.items():
        if flag and not (name == "bf16" and config.train.precision == "fp8"):  # of which it is DeepSpeed's part
            yield RequestedValue("train.precision", name, f"{name}.enabled", True)
        elif flag is False and config.train.weights_precision == name and not any(flags.values()):
            yield RequestedValue("train.precision", "fp32", f"{name}.enabled", False)


def _stage(file: DsFile) -> Iterator[RequestedValue]:
    stage = file.block("zero_optimization").get("stage")
    if stage is None:
        return
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise file.error(f"zero_optimization.stage: {json.dumps(stage)} is not 0, 1, 2 or 3")
    yield RequestedValue("parallel.zero_stage", int(stage), "zero_optimization.stage", stage)


def _clipping(file: DsFile, config: RunConfig) -> Iterator[RequestedValue]:
    value = file.values.get("gradient_clipping")
    if value is not None and config.optim.clip.mode == "per_group":
        raise UserError(
            f"gradient_clipping: {json.dumps(value)} (in {file.label}) clips the global norm, which contradicts "
            'optim.clip.mode: per_group; write "auto" in the DeepSpeed file, or set optim.clip.mode=global'
        )
    if value is not None:
        _check_number("gradient_clipping", value, file, least=0.0)
        yield RequestedValue("optim.clip.value", float(value) or None, "gradient_clipping", value)


# Optimizers that translate to AdamW. muadam and adam differ from AdamW by coupled decay only.
_ADAM_NAMES = ("adam", "adamw", "muadam", "muadamw")
_IMPLEMENTATION_OF = {"fusedadam": "deepspeed-fused", "cpuadam": "deepspeed-cpu", "deepspeedcpuadam": "deepspeed-cpu"}
_ADAM_KEYS = {"lr": "optim.lr", "betas": "optim.betas", "eps": "optim.eps", "weight_decay": "optim.weight_decay"}
_MODE_KEYS = ("torch_adam", "adam_w_mode", "adamw_mode", "foreach", "fused", "decoupled_wd", "fp32_optimizer_states")
_FIXED = {"amsgrad": False, "bias_correction": True, "maximize": False}


def _optimizer(file: DsFile, config: RunConfig) -> Iterator[RequestedValue]:
    block = file.block("optimizer")
    if not block:
        return
    kind, params = _kind_and_params(block, "optimizer", file)
    name = kind.lower()
    if name and name not in _ADAM_NAMES and name not in _IMPLEMENTATION_OF:
        raise file.error(
            f"optimizer.type: {kind} has no muP rules in megadit; use AdamW, or take the optimizer block out"
        )
    _check_optimizer_params(params, name, file)
    for key, run_key in _ADAM_KEYS.items():
        if key in params:
            yield RequestedValue(run_key, _adam_value(key, params[key], file), f"optimizer.params.{key}", params[key])
    implementation = _implementation(name, params, file, config)
    if implementation is not None:
        yield implementation
    if name.startswith("muadam"):
        yield from _mup_package(kind, params, file, config)


def _kind_and_params(block: dict[str, Any], name: str, file: DsFile) -> tuple[str, dict[str, Any]]:
    kind, params = block.get("type", ""), block.get("params", {})
    if not isinstance(kind, str) or not isinstance(params, dict):
        raise file.error(f'{name}: {json.dumps(block)} is not {{"type": NAME, "params": {{…}}}}')
    return kind, params


def _check_optimizer_params(params: dict[str, Any], name: str, file: DsFile) -> None:
    known = (*_ADAM_KEYS, *_MODE_KEYS, *_FIXED)
    for key, value in params.items():
        if key == "max_grad_norm":
            raise file.error("optimizer.params.max_grad_norm: DeepSpeed refuses it; set gradient_clipping")
        if key not in known:
            hint = did_you_mean(key, known, f"megadit translates {', '.join(_ADAM_KEYS)}")
            raise file.error(f"optimizer.params.{key}: is not a parameter of AdamW; {hint}")
        if key in _FIXED and value is not _FIXED[key]:
            required = json.dumps(_FIXED[key])
            raise file.error(f"optimizer.params.{key}: {json.dumps(value)} is not supported; set {required}")
    decoupled = name in ("adamw", "muadamw") or params.get("adam_w_mode", params.get("adamw_mode", name != "muadam"))
    if not decoupled and params.get("weight_decay"):
        raise file.error(
            f"optimizer.params.weight_decay: {params['weight_decay']} would be added to the gradient under this "
            f"optimizer; megadit decays weights directly: use AdamW"
        )


def _adam_value(key: str, value: Any, file: DsFile) -> Any:
    name = f"optimizer.params.{key}"
    if key != "betas":
        _check_number(name, value, file)
        return float(value)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise file.error(f"{name}: {json.dumps(value)} is not a list of two numbers")
    for beta in value:
        _check_number(name, beta, file)
    return tuple(float(beta) for beta in value)


def _implementation(name: str, params: dict[str, Any], file: DsFile, config: RunConfig) -> RequestedValue | None:
    key = "optim.implementation"
    if name in _IMPLEMENTATION_OF:
        return RequestedValue(key, _IMPLEMENTATION_OF[name], "optimizer.type", name)
    if params.get("foreach"):
        return RequestedValue(key, "torch-foreach", "optimizer.params.foreach", True)
    if params.get("fused"):
        return RequestedValue(key, "torch-fused", "optimizer.params.fused", True)
    is_torchs = config.optim.implementation in ("auto", "torch-fused", "torch-foreach")
    if params.get("torch_adam") is True and not is_torchs:
        return RequestedValue(key, "torch-fused", "optimizer.params.torch_adam", True)
    if params.get("torch_adam") is False:
        kernel = "deepspeed-cpu" if offloads_optimizer(file.block("zero_optimization")) else "deepspeed-fused"
        return RequestedValue(key, kernel, "optimizer.params.torch_adam", False)
    return None


def _mup_package(kind: str, params: dict[str, Any], file: DsFile, config: RunConfig) -> Iterator[RequestedValue]:
    """MuAdam and MuAdamW of the mup package, which decay vectors too, by a constant if ``decoupled_wd``."""
    if config.model.parametrization != "mup":
        raise file.error(
            f"optimizer.type: {kind} needs a muP model, but model.parametrization is sp; set model.parametrization=mup "
            f"or use AdamW"
        )
    if params.get("weight_decay"):
        mode = "constant" if params.get("decoupled_wd") else "independent"
        yield RequestedValue("optim.wd_vectors", True, "optimizer.type", kind)
        yield RequestedValue("optim.wd_mode", mode, "optimizer.params.decoupled_wd", bool(params.get("decoupled_wd")))


_FLATTENS = {
    "WarmupDecayLR": "optim.schedule=wsd",
    "OneCycle": "optim.schedule=cosine",
    "LRRangeTest": "a sweep over optim.lr",
}
_WARMUP_KEYS = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type"),
}


def _scheduler(file: DsFile) -> Iterator[RequestedValue]:
    block = file.block("scheduler")
    if not block:
        return
    kind, params = _kind_and_params(block, "scheduler", file)
    _check_scheduler(kind, params, file)
    if kind:
        yield RequestedValue(
            "optim.schedule", "cosine" if kind == "WarmupCosineLR" else "constant", "scheduler.type", kind
        )
    if params.get("warmup_num_steps") is not None:
        yield _requested_steps("optim.warmup_steps", "warmup_num_steps", params, file)
    if params.get("total_num_steps") is not None:
        yield _requested_steps("train.steps", "total_num_steps", params, file)
    if params.get("cos_min_ratio") is not None:
        key = "scheduler.params.cos_min_ratio"
        _check_number(key, params["cos_min_ratio"], file, least=0.0)
        yield RequestedValue("optim.min_lr_ratio", float(params["cos_min_ratio"]), key, params["cos_min_ratio"])


def _requested_steps(run_key: str, key: str, params: dict[str, Any], file: DsFile) -> RequestedValue:
    value = params[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise file.error(f"scheduler.params.{key}: {json.dumps(value)} is not a number of steps")
    return RequestedValue(run_key, value, f"scheduler.params.{key}", value)


def _check_scheduler(kind: str, params: dict[str, Any], file: DsFile) -> None:
    one_rate = "writes one learning rate into all parameter groups, which flattens the ratios of muP"
    if kind in _FLATTENS:
        raise file.error(f"scheduler.type: {kind} {one_rate}; take the block out and use {_FLATTENS[kind]}")
    if kind and kind not in _WARMUP_KEYS:
        raise file.error(
            f"scheduler.type: {kind} is not known; use WarmupLR or WarmupCosineLR, or take the block out and set "
            f"optim.schedule"
        )
    known = _WARMUP_KEYS.get(kind, sum(_WARMUP_KEYS.values(), ()))
    for key in params:
        if key not in known:
            hint = did_you_mean(key, known, f"{kind} has {', '.join(known)}")
            raise file.error(f"scheduler.params.{key}: is not a parameter of {kind}; {hint}")
    if params.get("warmup_max_lr") is not None:
        raise file.error(
            f"scheduler.params.warmup_max_lr: {json.dumps(params['warmup_max_lr'])} {one_rate}; leave it out: the peak "
            f"is optim.lr times each group's multiplier"
        )
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        if params.get(key):
            raise file.error(
                f"scheduler.params.{key}: {json.dumps(params[key])} is not supported; the warm-up starts from zero: "
                f"set 0"
            )
    if params.get("warmup_type", "linear") != "linear":
        shown = json.dumps(params["warmup_type"])
        raise file.error(f'scheduler.params.warmup_type: {shown} is not supported; set "linear"')


def _check_number(key: str, value: Any, file: DsFile, least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise file.error(f"{key}: {json.dumps(value)} is not a number")
    if least is not None and value < least:
        raise file.error(f"{key}: {json.dumps(value)} is not at least {least:g}")
