"""``convert``: a checkpoint from one format to another.

A reader opens a folder or file as ``Contents``; a writer makes another of them. Formats meet in nothing else, so a new
one is a reader and a writer here and a name in ``megadit.convert.FORMATS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megadit.config import RunConfig
from megadit.convert.contents import Contents, fresh
from megadit.convert.deepspeed_native import read_native
from megadit.convert.deepspeed_plain import write_plain
from megadit.convert.deepspeed_universal import read_universal, write_universal
from megadit.convert.run_checkpoints import read_run, write_run
from megadit.convert.state_dicts import (
    read_fp32_state_dict,
    read_safetensors,
    write_fp32_state_dict,
    write_safetensors,
)
from megadit.errors import UserError
from megadit.train.checkpoint_read import shape_problem, shapes_of

OWN = "megadit"
READERS: dict[str, Callable[[Path], Contents]] = {
    OWN: read_run,
    "safetensors": read_safetensors,
    "fp32-state-dict": read_fp32_state_dict,
    "deepspeed": read_native,
    "deepspeed-universal": read_universal,
}
WRITERS: dict[str, Callable[[Contents, Path, RunConfig | None], list[str]]] = {
    OWN: write_run,
    "safetensors": write_safetensors,
    "fp32-state-dict": write_fp32_state_dict,
    "deepspeed": write_plain,
    "deepspeed-universal": write_universal,
}


@dataclass(frozen=True)
class Outcome:
    """What a conversion read and wrote. ``kinds`` are those of the source that were read; ``notes`` are for people."""

    source: str
    target: str
    parameters: int
    elements: int
    kinds: tuple[str, ...]
    step: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


def convert(
    source_format: str,
    target_format: str,
    source: Path,
    target: Path,
    config: RunConfig | None = None,
    ema: str | None = None,
) -> Outcome:
    """Read ``source`` and write ``target``, which must not exist yet; after an error there is no ``target``.

    ``config`` is the run's; needed where the source has none and the target or its parameters' shapes ask for one.
    ``ema`` names an average of a megadit checkpoint that takes the place of its weights.

    Raises:
        UserError: the source is not what it should be, does not fit the config, or the target cannot be written.
    """
    if source_format == target_format == OWN:
        raise UserError("--to: megadit is what IN is already; copy it, or start from its weights with train.init_from")
    if ema is not None and source_format != OWN:
        raise UserError(f"--ema: {ema} is asked for, but {source_format} holds no averages; leave it out")
    if not source.exists():
        raise UserError(f"IN: '{source}' does not exist; give the folder or file to convert")
    contents = read_run(source, ema) if source_format == OWN else READERS[source_format](source)
    if config is not None:
        problem = shape_problem(contents.shapes, shapes_of(config))
        if problem:
            raise UserError(f"{contents.what}: {problem}; give the --config of the run that trained these weights")
        contents = replace(contents, config=config)
    with fresh(target) as temporary:
        notes = WRITERS[target_format](contents, temporary, contents.config)
    return Outcome(
        contents.what,
        str(target),
        len(contents.shapes),
        sum(math.prod(shape) for shape in contents.shapes.values()),
        contents.kinds,
        contents.position.step,
        (*contents.notes, *notes),
    )
