"""DeepSpeed's universal checkpoints: one folder per parameter, with a file for its weights and each moment.

``ds_to_universal`` makes them, in two forms that do not load into one another: at ZeRO 1 and 2 a dict with the shaped
tensor and Adam's step beside it, at ZeRO 3 the flat tensor alone. What is written here is read by both: the dicts, the
model file under both of its names, and ``optimizer_state.pt`` with the entries of either. It lists as many optimizer
groups as there are parameters, all empty: DeepSpeed goes through as many groups as are listed, and overwrites in
each what is listed (at ZeRO 3 with the first group's numbers in all), so every group keeps its own rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.format import WEIGHTS
from megadit.convert.contents import Contents, Part
from megadit.convert.deepspeed.files import (
    adam_step,
    check_tensors,
    model_files,
    model_state,
    position_of,
    read_checkpoint,
    shape_of,
    version_of,
)
from megadit.convert.deepspeed.plain import TAG, model_header
from megadit.convert.torch_files.safe_load import load_file
from megadit.convert.torch_files.write import save_streaming
from megadit.engine.deepspeed.partitions import MOMENTS
from megadit.errors import UserError

_FILES = {WEIGHTS: "fp32.pt", **{kind: f"{kind}.pt" for kind in MOMENTS}}


def read_universal(path: Path) -> Contents:
    """The contents of a universal checkpoint: the folder that ``latest_universal`` lies in, or the one it names.

    Raises:
        UserError: none is there, or a file is missing or broken.
    """
    return read_checkpoint(path, "latest_universal", "universal DeepSpeed", _read_folder)


def _read_folder(folder: Path) -> Contents:
    state = model_state(model_files(folder)[0])
    description = f"universal DeepSpeed checkpoint '{folder}' ({version_of(state)})"
    names = sorted(each.name for each in (folder / "zero").iterdir() if (each / _FILES[WEIGHTS]).is_file())
    listed = {name: shape_of(shape) for group in state.get("param_shapes") or () for name, shape in group.items()}
    missing = sorted(set(listed) - set(names))
    if not names or missing:
        file = folder / "zero" / (missing[0] if missing else "*") / _FILES[WEIGHTS]
        raise UserError(f"{file}: is missing; copy the whole checkpoint, or convert it with ds_to_universal again")
    shapes = {}
    for name in names:
        value = _tensor(folder / "zero" / name / _FILES[WEIGHTS])
        # A dict of ZeRO 1 and 2 holds the shaped tensor; ZeRO 3 flattens it.
        shapes[name] = listed.get(name, tuple(value.shape))
        if math.prod(shapes[name]) != value.numel():
            raise UserError(f"{description}: '{name}' has {value.numel()} elements, its shape is {list(shapes[name])}")

    def read(kind: str, name: str) -> Sequence[Part]:
        return [(0, _tensor(folder / "zero" / name / _FILES[kind]).reshape(-1))]

    common = folder / "zero" / "optimizer_state.pt"
    shared: dict[str, Any] = load_file(common) if common.is_file() else {}
    contents = Contents(
        description, shapes, (WEIGHTS, *MOMENTS), read, position_of(state), groups=shared.get("param_groups") or ()
    )
    bare = [name for name in names if not all((folder / "zero" / name / _FILES[kind]).is_file() for kind in MOMENTS)]
    if bare:
        return contents.weights_only(f"{len(bare)} of {len(names)} parameters have no moments ({bare[0]}, …)")
    step, reason = _step(folder / "zero", names, shared)
    if step == 0:
        reason = reason or "the optimizer has taken no step"
    return contents.weights_only(reason) if reason else replace(contents, adam_step=step)


def _tensor(file: Path) -> Tensor:
    value = load_file(file)
    value = value.get("param") if isinstance(value, dict) else value
    if not isinstance(value, Tensor):
        raise UserError(f"{file}: holds no tensor; convert the checkpoint with ds_to_universal again")
    check_tensors([value])
    return value


def _step(folder: Path, names: Sequence[str], shared: dict[str, Any]) -> tuple[int, str]:
    step_files = [file for name in names if (file := folder / name / "step.pt").is_file()]
    moments = dict.fromkeys(MOMENTS, torch.empty(0))
    if step_files:
        return adam_step([{"step": load_file(file), **moments} for file in step_files], ())
    inner = shared.get("optimizer_state_dict") or {}
    states = list((inner.get("state") or {}).values())
    groups = shared.get("param_groups") or ()
    return adam_step([{**moments, **state} for state in states] or [moments], groups)


def write_universal(contents: Contents, target: Path) -> list[str]:
    """Write a folder that ``engine.load_checkpoint`` reads at ZeRO 1, 2 and 3 on any number of ranks.

    Weights alone get the moments of an Adam that has not stepped, zeros, since stage 3 loads nothing without moments.
    Returns what people should know.

    Raises:
        UserError: a parameter's name cannot be a folder's.
    """
    tag = TAG.format(contents.position.step)
    zero = target / tag / "zero"
    step = torch.tensor(float(contents.adam_step))
    for name in contents.shapes:
        if Path(name).name != name:
            raise UserError(f"IN: the parameter name '{name}' cannot be a folder, as deepspeed-universal needs it")
        (zero / name).mkdir(parents=True)
        for kind, file in _FILES.items():
            value = contents.tensor(kind, name) if kind in contents.kinds else torch.zeros(contents.shapes[name])
            save_streaming({"param": value, "cat_dim": 0}, zero / name / file)
        save_streaming(step, zero / name / "step.pt")
    header = model_header(contents)
    groups: list[dict[str, Any]] = [{} for _ in contents.shapes]
    common = {
        "ds_version": header["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }
    save_streaming(common, zero / "optimizer_state.pt")
    shapes = [{name: torch.Size(shape) for name, shape in contents.shapes.items()}]
    state = {**header, "module": {}, "optimizer": None, "param_shapes": shapes, "universal_checkpoint_info": {}}
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        save_streaming(state, target / tag / file)
    for pointer in ("latest_universal", "latest"):
        (target / pointer).write_text(tag, encoding="utf-8")
    how = 'load it with engine.load_checkpoint(OUT), "checkpoint": {"load_universal": true} and ZeRO stage 1, 2 or 3'
    return [how] if contents.has_moments else [how, "the optimizer begins anew: its moments are zeros at step 0"]
