"""Reading a DeepSpeed configuration file: JSON in, ``"auto"`` out, and what megadit cannot run refused.

DeepSpeed ignores top-level keys that it does not know, so a typo there changes nothing and says nothing; here
it gives a warning. Unknown ZeRO keys, which DeepSpeed answers with a traceback, are errors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config.deepspeed.keys import IDLE_BLOCKS, KNOWN_KEYS, REFUSED_BLOCKS, ZERO_KEYS
from megadit.config.loading.sources import display, find_config
from megadit.errors import UserError
from megadit.files.json_text import JsonError, parse_json

AUTO = "auto"


@dataclass(frozen=True)
class DsFile:
    """A DeepSpeed configuration without its ``"auto"`` values, what to call it, and what to warn of."""

    values: dict[str, Any]
    label: str
    warnings: tuple[str, ...] = ()

    def block(self, name: str) -> dict[str, Any]:
        """The block called ``name``, {} if it is not there. Raises UserError if it is no object."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise UserError(f"{name}: {json.dumps(value)} is not an object of keys and values (in {self.label})")
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
    _refuse_blocks(values, label)
    file = DsFile(values, label, tuple(_unknown_keys(values, label)))
    _check_zero(file)
    return file


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
    """Leave out what is "auto": the run config sets it, or DeepSpeed's default stands."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            kept[key] = _without_auto(value)
        elif not (isinstance(value, str) and value == AUTO):
            kept[key] = value
    return kept


def _refuse_blocks(values: dict[str, Any], label: str) -> None:
    for name, reason in REFUSED_BLOCKS.items():
        if name not in values:
            continue
        if _is_on(name, values[name]):
            raise UserError(f"{name}: {reason} (in {label})")
        del values[name]
    if values.get("sequence_parallel_size", 1) != 1:
        size = values["sequence_parallel_size"]
        raise UserError(f"sequence_parallel_size: {size} is not supported; take it out (in {label})")
    if values.get("gradient_allreduce_op", "mean") != "mean":
        op = values["gradient_allreduce_op"]
        raise UserError(f"gradient_allreduce_op: {op} would scale gradients by the ranks; set mean (in {label})")
    if values.get("managed_gradient_accumulation", True) is not True:
        raise UserError(f"managed_gradient_accumulation: false is not supported; take it out (in {label})")


def _is_on(name: str, block: Any) -> bool:
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
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "it has no effect"
            warnings.append(f"{key}: DeepSpeed has no such key and ignores it; {hint} (in {label})")
    return warnings


def _check_zero(file: DsFile) -> None:
    zero = file.block("zero_optimization")
    for key in zero:
        if key not in ZERO_KEYS:
            near = difflib.get_close_matches(key, ZERO_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "take it out"
            raise UserError(f"zero_optimization.{key}: DeepSpeed has no such key; {hint} (in {file.label})")
    if zero.get("zenflow"):
        raise UserError(
            f"zero_optimization.zenflow: it replaces the optimizer's step, which is megadit's; take it out "
            f"(in {file.label})"
        )
    if zero.get("compute_grad_norm", True) is not True:
        raise UserError(
            f"zero_optimization.compute_grad_norm: false, but megadit logs the norm; take it out (in {file.label})"
        )
    for name, what in (("offload_optimizer", "the master weights"), ("offload_param", "the weights")):
        block = zero.get(name)
        if isinstance(block, dict) and block.get("device") == "nvme":
            raise UserError(
                f"zero_optimization.{name}.device: nvme swaps out {what} that checkpoints are made from and restored "
                f"to; set cpu (in {file.label})"
            )
    offload = zero.get("offload_optimizer")
    for key, plain in (("ratio", 1.0), ("super_offload", False)):
        if isinstance(offload, dict) and offload.get(key, plain) != plain:
            raise UserError(
                f"zero_optimization.offload_optimizer.{key}: {json.dumps(offload[key])} hands a part of the update to "
                f"an optimizer of DeepSpeed's own, which has not muP's learning rates; take it out (in {file.label})"
            )
