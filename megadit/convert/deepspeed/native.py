"""Reading what DeepSpeed's ``engine.save_checkpoint`` writes: ZeRO 1, 2 and 3, and its BF16_Optimizer.

Every rank writes one file of flat float32 buffers and Adam moments, which name nothing; which parameter lies where
follows from ``param_shapes`` in the model file. Written against DeepSpeed 0.19.

=================  ==========================================  =============================================
ZeRO               a rank's buffers                            where a parameter lies
=================  ==========================================  =============================================
1, 2, BF16         one per optimizer group: the rank's equal   in the order of the group's parameters, with
                   part of the padded group; the padding is    ``param_alignment_paddings`` between them
                   cut off in weights and kept in moments
3                  one per sub group                           an equal share of every parameter, rounded up
=================  ==========================================  =============================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from megadit.convert.deepspeed.plain import read_plain
from megadit.convert.torch_files.placeholders import Placeholder
from megadit.convert.torch_files.safe_load import load_file
from megadit.engine.deepspeed.partitions import LOSS_SCALE, MOMENTS
from megadit.errors import UserError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


class BufferSlice(NamedTuple):
    """``length`` elements of a parameter from ``start``, at ``offset`` of buffer ``group`` of ``rank``."""

    rank: int
    group: int
    offset: int
    start: int
    length: int


@dataclass
class _ZeroBuffers:
    """The flat buffers of all ranks, and in which slices of them each parameter's elements lie."""

    weights: list[list[Tensor]]  # by rank and group, as are the states
    states: list[list[dict[str, Any]]]
    param_groups: list[dict[str, Any]]
    slices: dict[str, list[BufferSlice]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def buffer(self, kind: str, part: BufferSlice) -> Tensor:
        if kind == WEIGHTS:
            return self.weights[part.rank][part.group]
        return self.states[part.rank][part.group][kind]

    def read(self, kind: str, name: str) -> list[Part]:
        return [(s.start, self.buffer(kind, s).view(-1).narrow(0, s.offset, s.length)) for s in self.slices[name]]

    def misfit(self, kinds: Sequence[str]) -> str | None:
        """A parameter for which the buffers are too small."""
        for name, slices in self.slices.items():
            for part in slices:
                check_tensors(self.buffer(kind, part) for kind in kinds)
                if any(self.buffer(kind, part).numel() < part.offset + part.length for kind in kinds):
                    return name
        return None


def read_native(path: Path) -> Contents:
    """The contents of a native checkpoint: the folder given to save_checkpoint, or one of its ``global_step…``.

    Raises:
        UserError: none is there, a rank's file is missing or broken, or it is of tensor or pipeline parallelism.
    """
    return read_checkpoint(path, "latest", "DeepSpeed", _read_folder)


def _read_folder(folder: Path) -> Contents:
    files = model_files(folder)
    state = model_state(files[0])
    rank_files = {int(match[1]): file for file in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(file.name))}
    if not rank_files and not state.get("param_shapes"):
        return read_plain(folder, state)
    ranks = _rank_files(folder, rank_files, state)
    zero_states = [_optimizer_state(file) for file in ranks]
    stage = zero_states[0].get("zero_stage")
    spread = f"ZeRO-{stage}" if stage is not None else "BF16_Optimizer"
    description = f"DeepSpeed checkpoint '{folder}' ({spread}, {len(ranks)} ranks, {version_of(state)})"
    zero = _stage3(zero_states, state) if stage == 3 else _stage12(zero_states, state)
    frozen = _frozen(files if stage == 3 else files[:1], state, zero.shapes)
    check_tensors(values for _, parts in frozen.values() for _, values in parts)
    problem = zero.misfit([WEIGHTS])
    if problem:
        raise UserError(
            f"{description}: its buffers are smaller than '{problem}' needs; state that was offloaded to NVMe is not "
            "in them: save a checkpoint without offloading to NVMe"
        )
    shapes = {**zero.shapes, **{name: shape for name, (shape, _) in frozen.items()}}

    def read(kind: str, name: str) -> Sequence[Part]:
        return frozen[name][1] if name in frozen else zero.read(kind, name)

    contents = Contents(
        description,
        shapes,
        (WEIGHTS, *MOMENTS),
        read,
        position_of(state),
        groups=zero.param_groups,
        notes=_shared(state),
    )
    return _with_moments(contents, zero, zero_states[0], frozen)


def _rank_files(folder: Path, rank_files: dict[int, Path], state: Mapping[str, Any]) -> list[Path]:
    count = int(state.get("dp_world_size") or len(rank_files))
    missing = [rank for rank in range(count) if rank not in rank_files]
    if missing:
        names = ", ".join(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in missing[:3])
        raise UserError(
            f"IN: '{folder}' is of {count} ranks, and {len(missing)} of their files are missing ({names}); copy the "
            "files of all ranks, or use an earlier checkpoint"
        )
    return [rank_files[rank] for rank in range(count)]


def _optimizer_state(file: Path) -> dict[str, Any]:
    state = load_file(file)
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if not isinstance(inner, dict):
        raise UserError(f"{file}: holds no optimizer state of DeepSpeed's ZeRO; copy it again")
    return inner


def _stage12(files: list[dict[str, Any]], state: Mapping[str, Any]) -> _ZeroBuffers:
    weights = [file["single_partition_of_fp32_groups"] for file in files]
    bases = [file["base_optimizer_state"] for file in files]
    if isinstance(bases[0], list):  # "elastic_checkpoint": no torch state dict around it
        groups: list[dict[str, Any]] = []
        states = bases
    else:
        groups = bases[0]["param_groups"]
        states = [[base["state"].get(group["params"][0], {}) for group in groups] for base in bases]
    zero = _ZeroBuffers(weights, states, groups)
    for g, shapes in enumerate(state["param_shapes"]):
        cut = files[0]["group_paddings"][g] if "zero_stage" in files[0] else 0  # BF16_Optimizer keeps its padding
        size = weights[0][g].numel() + cut
        between = files[0].get("param_alignment_paddings") or [[0] * len(each) for each in state["param_shapes"]]
        first = 0
        for (name, shape), padding in zip(shapes.items(), between[g], strict=True):
            end = first + math.prod(shape)
            zero.shapes[name] = shape_of(shape)
            zero.slices[name] = [
                BufferSlice(r, g, low - r * size, low - first, min(end, (r + 1) * size) - low)
                for r in range(len(files))
                if (low := max(first, r * size)) < min(end, (r + 1) * size)
            ]
            first = end + padding
    return zero


def _stage3(files: list[dict[str, Any]], state: Mapping[str, Any]) -> _ZeroBuffers:
    weights = [file["fp32_flat_groups"] for file in files]
    bases = [file["optimizer_state_dict"] for file in files]
    states = [[base["state"].get(s, {}) for s in range(len(weights[0]))] for base in bases]
    zero = _ZeroBuffers(weights, states, bases[0]["param_groups"])
    for sub_group, shapes in enumerate(state["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            total = math.prod(shape)
            share = -(-total // len(files))
            zero.shapes[name] = shape_of(shape)
            zero.slices[name] = [
                BufferSlice(r, sub_group, offset, r * share, min(share, total - r * share))
                for r in range(len(files))
                if r * share < total
            ]
            offset += share
    return zero


def _frozen(
    files: list[Path], state: Mapping[str, Any], trained: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], list[Part]]]:
    """Shapes and parts of the parameters that were not trained: whole in the model file, or shared out at ZeRO-3."""
    others = {*trained, *(state.get("buffer_names") or ()), *(state.get("shared_params") or ())}
    if len(files) == 1 and not state.get("frozen_param_shapes"):
        values = {name: value for name, value in state["module"].items() if name not in others and value.numel()}
        return {name: (tuple(value.shape), [(0, value.view(-1))]) for name, value in values.items()}
    frozen: dict[str, tuple[tuple[int, ...], list[Part]]] = {}
    if not state.get("frozen_param_shapes"):
        return frozen
    fragments = [load_file(file)["frozen_param_fragments"] for file in files]
    for name, shape in state["frozen_param_shapes"].items():
        total, start, parts = math.prod(shape), 0, []
        for values in (each[name].view(-1) for each in fragments):
            count = min(values.numel(), total - start)
            if count > 0:
                parts.append((start, values[:count]))
                start += count
        frozen[name] = (shape_of(shape), parts)
    return frozen


def _shared(state: Mapping[str, Any]) -> tuple[str, ...]:
    shared = state.get("shared_params") or {}
    return tuple(f"'{name}' is the same parameter as '{owner}' and is left out" for name, owner in shared.items())


def _with_moments(
    contents: Contents, zero: _ZeroBuffers, first: Mapping[str, Any], frozen: Mapping[str, Any]
) -> Contents:
    """Adam's step and the loss scale, or what remains without Adam's moments."""
    if frozen:
        return contents.weights_only(f"frozen parameters have no moments ({next(iter(frozen))}, {len(frozen)} in all)")
    used = {(part.rank, part.group) for slices in zero.slices.values() for part in slices}
    states = [zero.states[rank][group] for rank, group in sorted(used)]
    step, reason = adam_step(states, zero.param_groups, first.get("base_optimizer_state_step"))
    if not reason and zero.misfit(MOMENTS):
        reason = "the optimizer's moments are not of the parameters' sizes"
    if reason:
        return contents.weights_only(reason)
    scale = {}
    if first.get("dynamic_loss_scale") and isinstance(first.get("loss_scaler"), Placeholder):
        scale = {key: value for key, value in vars(first["loss_scaler"]).items() if key in LOSS_SCALE}
    return replace(contents, adam_step=step, loss_scale=scale)
