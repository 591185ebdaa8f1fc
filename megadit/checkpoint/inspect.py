"""Looking at checkpoints: what one holds, whether it is as it was written, and how two differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.compatibility import describe_changes
from megadit.checkpoint.find import OpenedCheckpoint, open_checkpoint
from megadit.checkpoint.format import BrokenCheckpoint, StoredFragment, kinds_of
from megadit.checkpoint.fragment_reader import FragmentReader
from megadit.checkpoint.read import StoredCheckpoint
from megadit.errors import UserError
from megadit.slices import PendingSpans, contiguous_spans

_CHUNK = 1 << 22  # elements compared at once
_COUNTERS = ("step", "samples_seen", "skipped_steps", "adam_step", "loss_scale")


def open_for_inspection(path: str) -> OpenedCheckpoint:
    """A checkpoint folder, or a run directory's newest sound one.

    Raises:
        BrokenCheckpoint: broken beyond opening.
        UserError: neither.
    """
    opened = open_checkpoint(Path(path), path, "checkpoint")
    if opened is None:
        raise UserError(f"'{path}' has no checkpoint yet; give one, or a run directory that has")
    return opened


def summary(stored: StoredCheckpoint, norms: bool = False) -> dict[str, Any]:
    """Step, counters, layout, bytes by kind and, with ``norms``, every parameter's shape and L2 norms."""
    facts: dict[str, Any] = {
        "path": str(stored.path),
        "version": stored.index.version,
        **{key: stored.state.get(key) for key in _COUNTERS},
        "layout": stored.state.get("layout"),
        "parameters": len(stored.parameters),
        "elements": sum(math.prod(shape) for shape in stored.parameters.values()),
        "pieces": len(stored.index.fragments),
        "bytes": kinds_of(stored.index.fragments),
        "files": len({fragment.file for fragment in stored.index.fragments}),
        "groups": stored.state.get("groups", []),
    }
    if norms:
        with stored.reader() as reader:
            facts["tensors"] = {
                name: {"shape": shape, **{kind: _norm(reader, kind, name, shape) for kind in stored.kinds}}
                for name, shape in stored.parameters.items()
            }
    return facts


def _norm(reader: FragmentReader, kind: str, name: str, shape: list[int]) -> float | None:
    squares = [float(values.double().square().sum()) for values in _chunks(reader, kind, name, shape)]
    return _finite(math.sqrt(sum(squares)))


def _chunks(reader: FragmentReader, kind: str, name: str, shape: list[int]) -> Iterator[Tensor]:
    count = math.prod(shape)
    for start in range(0, count, _CHUNK):
        values = torch.empty(min(_CHUNK, count - start))
        reader.read_into(values, kind, name, start)
        yield values


def verify(checkpoint: StoredCheckpoint) -> list[str]:
    """Read everything; returns what is not as it was written, of format version 1 only what its sizes betray."""
    problems = []
    with checkpoint.reader() as reader:
        for fragment in checkpoint.index.fragments:
            try:
                reader.check(fragment)
            except BrokenCheckpoint as error:
                problems.append(str(error))
    return list(dict.fromkeys(problems + _missing_elements(checkpoint)))


def _missing_elements(checkpoint: StoredCheckpoint) -> list[str]:
    fragments: dict[tuple[str, str], list[StoredFragment]] = {}
    for fragment in checkpoint.index.fragments:
        fragments.setdefault((fragment.kind, fragment.name), []).append(fragment)
    problems = []
    for kind in checkpoint.kinds:
        for name, shape in checkpoint.parameters.items():
            pending = PendingSpans(contiguous_spans(shape, None, 0, math.prod(shape)))
            for stored in fragments.get((kind, name), ()):
                pending.take(contiguous_spans(shape, stored.shard_regions, stored.start, stored.stop))
            if pending.remaining:
                problems.append(
                    f"checkpoint {checkpoint.path}: {pending.remaining} elements of {kind} of '{name}' are missing"
                )
    return problems


def compare(a: StoredCheckpoint, b: StoredCheckpoint) -> dict[str, Any]:
    """How B differs from A.

    ``same`` is about what a run would go on from: every tensor bit for bit, and the counters. ``config`` lists keys
    whose values differ, which does not make them different. ``max_rel`` is the largest difference over the largest
    absolute value in A's tensor.
    """
    shapes_a, shapes_b = a.parameters, b.parameters
    common = [name for name in shapes_a if shapes_b.get(name) == shapes_a[name]]
    kinds = [kind for kind in a.kinds if kind in b.kinds]
    rows = []
    with a.reader() as reader_a, b.reader() as reader_b:
        for kind in kinds:
            for name in common:
                rows.append({"kind": kind, "name": name, **_distance(reader_a, reader_b, kind, name, shapes_a[name])})
    counters = {key: [a.state.get(key), b.state.get(key)] for key in _COUNTERS if a.state.get(key) != b.state.get(key)}
    missing = {
        "parameters": sorted({*shapes_a, *shapes_b} - set(common)),
        "kinds": sorted({*a.kinds} ^ {*b.kinds}),
    }
    different = [row for row in rows if not row["equal"]]
    return {
        "a": str(a.path),
        "b": str(b.path),
        "same": not (different or counters or missing["parameters"] or missing["kinds"]),
        "counters": counters,
        "not_in_both": missing,
        "kinds": {kind: _worst([row for row in rows if row["kind"] == kind]) for kind in kinds},
        "tensors": different,
        "config": describe_changes(a.config, b.config),
    }


def _distance(a: FragmentReader, b: FragmentReader, kind: str, name: str, shape: list[int]) -> dict[str, Any]:
    largest = scale = 0.0
    equal = True
    for left, right in zip(_chunks(a, kind, name, shape), _chunks(b, kind, name, shape), strict=True):
        # Bits and not values: a NaN equals itself, and zero is not minus zero.
        equal = equal and torch.equal(left.view(torch.int32), right.view(torch.int32))
        gap = (left.double() - right.double()).abs().max().item()
        largest = math.nan if math.isnan(gap) or math.isnan(largest) else max(largest, gap)
        scale = max(scale, left.abs().nan_to_num(0.0, 0.0).max().item())
    if equal:
        largest = 0.0
    relative = largest / scale if scale else (0.0 if equal else math.inf)
    return {"equal": equal, "max_abs": _finite(largest), "max_rel": _finite(relative)}


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest differences of a kind, and how many of its tensors differ."""
    return {
        "tensors": len(rows),
        "different": sum(not row["equal"] for row in rows),
        "max_abs": max((row["max_abs"] for row in rows), key=_size, default=0.0),
        "max_rel": max((row["max_rel"] for row in rows), key=_size, default=0.0),
    }


def _finite(value: float) -> float | None:
    """None, which JSON knows, where a number is not finite."""
    return value if math.isfinite(value) else None


def _size(value: float | None) -> float:
    return math.inf if value is None else value


def _sizes(row: dict[str, Any]) -> str:
    return f"{_size(row['max_abs']):.3g} absolute, {_size(row['max_rel']):.3g} relative"


def _spread(layout: dict[str, Any]) -> str:
    """``8 rank(s) (tensor 2 x pipeline 2 x data 2)``; the second part where ranks share a model."""
    ranks, tensor, pipeline = layout.get("ranks"), layout.get("tensor", 1), layout.get("pipeline", 1)
    if ranks is None or tensor * pipeline == 1:
        return f"{ranks} rank(s)"
    return f"{ranks} rank(s) (tensor {tensor} x pipeline {pipeline} x data {ranks // (tensor * pipeline)})"


def describe_summary(facts: dict[str, Any]) -> str:
    """What ``summary`` returned, as the lines that the command prints."""
    layout = facts["layout"] or {}
    lines = [
        f"{facts['path']}   format version {facts['version']}",
        f"step {facts['step']}, {facts['samples_seen']} samples, Adam step {facts['adam_step']}, "
        f"{facts['skipped_steps']} updates skipped"
        + (f", loss scale {facts['loss_scale']['cur_scale']:g}" if facts["loss_scale"] else ""),
        f"written by {_spread(layout)} at ZeRO stage {layout.get('zero_stage')}: {facts['pieces']} pieces "
        f"in {facts['files']} file(s)",
        f"{facts['parameters']} parameters, {facts['elements']:,} elements",
        *(f"  {kind:14s} {size / 1e6:12.3f} MB" for kind, size in facts["bytes"].items()),
    ]
    for name, row in facts.get("tensors", {}).items():
        norms = "  ".join(f"{kind} {value:.6g}" for kind, value in row.items() if kind != "shape")
        lines.append(f"{name}  {tuple(row['shape'])}  {norms}")
    return "\n".join(lines)


def describe_comparison(comparison: dict[str, Any]) -> str:
    """The comparison as lines, the 20 most different tensors of it."""
    lines = [f"A {comparison['a']}", f"B {comparison['b']}"]
    lines += [f"{key}: {old} → {new}" for key, (old, new) in comparison["counters"].items()]
    lines += [
        f"{side_kind} not in both: {', '.join(names)}"
        for side_kind, names in comparison["not_in_both"].items()
        if names
    ]
    for kind, row in comparison["kinds"].items():
        verdict = f"{row['different']} of {row['tensors']} tensors differ, by at most {_sizes(row)}"
        lines.append(f"{kind}: " + (verdict if row["different"] else f"all {row['tensors']} tensors equal"))
    worst = sorted(comparison["tensors"], key=lambda row: -_size(row["max_rel"]))
    lines += [f"  {row['kind']} {row['name']}: {_sizes(row)}" for row in worst[:20]]
    lines += [f"config: {change}" for change in comparison["config"]]
    return "\n".join([*lines, "same" if comparison["same"] else "different"])
