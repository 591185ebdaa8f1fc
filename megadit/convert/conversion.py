"""``convert``: a checkpoint from one format to another.

A reader opens a folder or file as ``Contents``; a writer makes another of them. Formats meet in nothing else, so a new
one is a reader and a writer here and a name in ``megadit.convert.formats``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megadit.checkpoint.compatibility import shape_problem, shapes_of
from megadit.checkpoint.format import WEIGHTS
from megadit.config import RunConfig
from megadit.convert.contents import Contents, ValueCheck
from megadit.convert.deepspeed.native import read_native
from megadit.convert.deepspeed.plain import write_plain
from megadit.convert.deepspeed.universal import read_universal, write_universal
from megadit.convert.defaults import check_config_model, default_run
from megadit.convert.diffusers.difference import Difference
from megadit.convert.diffusers.folder import read_diffusers, write_diffusers
from megadit.convert.official import read_official, write_official
from megadit.convert.request import MEGADIT, Request, check_request, new_target
from megadit.convert.run_checkpoints import read_run, write_run
from megadit.convert.state_dicts import (
    read_fp32_state_dict,
    read_safetensors,
    write_fp32_state_dict,
    write_safetensors,
)
from megadit.errors import UserError
from megadit.models.conversion import conversion_of

DIFFUSERS = "diffusers"
_Read = Callable[[Path, Request, ValueCheck], Contents]
_Write = Callable[[Contents, Path, Request, ValueCheck], tuple[list[str], Difference | None]]


def _reader(read: Callable[[Path], Contents]) -> _Read:
    return lambda path, request, check: check.watched_contents(read(path))


def _writer(write: Callable[[Contents, Path], list[str]]) -> _Write:
    return lambda contents, target, request, check: (write(contents, target), None)


_WITH_CONFIG = (MEGADIT, "safetensors")  # formats that hold a run's configuration
_FORMATS: Mapping[str, tuple[_Read, _Write]] = {
    MEGADIT: (
        lambda path, request, check: check.watched_contents(read_run(path, request.ema)),
        _writer(write_run),
    ),
    "safetensors": (read_safetensors, _writer(write_safetensors)),
    "fp32-state-dict": (read_fp32_state_dict, _writer(write_fp32_state_dict)),
    "deepspeed": (_reader(read_native), _writer(write_plain)),
    "deepspeed-universal": (_reader(read_universal), _writer(write_universal)),
    DIFFUSERS: (read_diffusers, write_diffusers),
}


def reader_and_writer(name: str) -> tuple[_Read, _Write]:
    """What reads and what writes the format ``name``, one of ``megadit.convert.formats()``."""
    if name in _FORMATS:
        return _FORMATS[name]
    family = name.removeprefix("official-")
    return partial(read_official, family), _writer(partial(write_official, family))


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion read and wrote. ``kinds`` are those of the source that were read; ``notes`` are for people.

    ``difference`` is how far diffusers' class and the model here are apart, where one of them was converted to the
    other and the two were compared.
    """

    source: str
    target: str
    parameters: int
    elements: int
    kinds: tuple[str, ...]
    step: int
    notes: tuple[str, ...]
    difference: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as ``--json`` prints it."""
        return asdict(self)


def convert(
    source_format: str,
    target_format: str,
    source: Path,
    target: Path,
    config: RunConfig | None = None,
    ema: str | None = None,
    *,
    hints: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    allow_inexact: bool = False,
    allow_nonfinite: bool = False,
) -> ConversionResult:
    """Read ``source`` and write ``target``, which must not exist yet; after an error there is no ``target``.

    ``config`` is the run's; needed where the source has none and the target or its parameters' shapes ask for one.
    ``ema`` names an average of a megadit checkpoint, or a key, a prefix of names or a file of another, that takes the
    place of the weights. ``hints`` say what the weights of an official file cannot. ``overrides`` change the default
    configuration that a model without one gets. ``allow_inexact`` lets diffusers' class and the model here differ,
    ``allow_nonfinite`` weights be NaN, infinite or beyond float32; without it such weights are refused.

    Raises:
        UserError: the source is not what it should be, does not fit the config, or the target cannot be written.
    """
    request = Request(config, ema, hints or {}, tuple(overrides), allow_inexact, allow_nonfinite)
    check = ValueCheck()
    check_request(source_format, target_format, source, target, request)
    (read, _), (_, write) = reader_and_writer(source_format), reader_and_writer(target_format)
    contents = _with_config(read(source, request, check), request, target_format)
    with new_target(target) as temporary:
        notes, difference = write(contents, temporary, request, check)
        value_notes = check.notes(allow_nonfinite)  # all have been read, and OUT has no name yet
    return ConversionResult(
        contents.description,
        str(target),
        len(contents.shapes),
        sum(math.prod(shape) for shape in contents.shapes.values()),
        contents.kinds,
        contents.position.step,
        (*contents.notes, *_dtype_notes(contents), *notes, *value_notes),
        difference or contents.difference,
    )


def _dtype_notes(contents: Contents) -> list[str]:
    """A note on the dtypes of the source's weights, where one is not float32."""
    types = {values.dtype for name in contents.shapes for _, values in contents.read(WEIGHTS, name)}
    if types <= {torch.float32}:
        return []
    names = ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
    return [f"the source holds weights as {names}; they are float32 from here on"]


def _with_config(contents: Contents, request: Request, target_format: str) -> Contents:
    """The contents with the run's configuration: the given one, if it is of the same model, or the defaults."""
    config = request.config
    if config is None:
        if contents.model is None or (target_format not in _WITH_CONFIG and not request.overrides):
            return contents
        made = default_run(contents.model, request.overrides, contents.known)
        check_config_model(made.model, contents.model, contents.description)
        notes = [*contents.notes]
        if target_format == MEGADIT:
            notes += conversion_of(made.model.family).notes
            notes.append("the model's configuration is that of the weights, the rest are defaults: see OUT/config.yaml")
        return replace(contents, config=made, notes=tuple(notes))
    if contents.model is not None:
        check_config_model(config.model, contents.model, contents.description)
    problem = shape_problem(contents.shapes, shapes_of(config))
    if problem:
        raise UserError(f"{contents.description}: {problem}; give the --config of the run that trained these weights")
    return replace(contents, config=config, model=config.model if contents.model is not None else None)
