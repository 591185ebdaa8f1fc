"""What DeepSpeed's native and universal checkpoints have in common: folders, model files, Adam's step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.checkpoint.format import Position
from megadit.convert.contents import Contents
from megadit.convert.parameter_names import plain_names
from megadit.convert.torch_files.safe_load import load_file, odd_kind
from megadit.engine.deepspeed.partitions import MOMENTS
from megadit.errors import UserError
from megadit.files.file_kind import text_instead
from megadit.files.folder_kind import run_instead
from megadit.files.json_fields import shown
from megadit.files.text import decode
from megadit.models.conversion.key_maps import listed

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


def find_folder(path: Path, pointer: str, kind: str) -> Path:
    """The folder that holds the files: ``path`` itself, or the one that its file ``pointer`` names.

    Raises:
        UserError: neither holds model files.
    """
    named = (_pointed(path, pointer), _pointed(path, "latest"))
    for folder in (path, *named):
        if folder is not None and folder.is_dir() and any(_MODEL.fullmatch(file.name) for file in folder.iterdir()):
            universal = (folder / "zero").is_dir()
            if universal == (kind == "DeepSpeed"):
                name = "deepspeed-universal" if universal else "deepspeed"
                raise UserError(f"IN: '{folder}' is a checkpoint of another format; read it with --from {name}")
            return folder
        if folder is not None and folder.is_dir() and any(folder.glob("layer_*_model_states.pt")):
            break
    held = [str(folder) for folder in path.glob("global_step*") if folder.is_dir()]
    if held and not any(folder is not None and folder.is_dir() for folder in named):
        raise UserError(
            f"IN: '{path}' has folders of checkpoints ({listed(held)}), but its file '{pointer}' names none of them; "
            "give the one that is meant"
        )
    other = run_instead(path)
    if other is not None and "--from deepspeed" not in other:
        raise UserError(f"IN: '{path}' is no {kind} checkpoint: {other}")
    raise UserError(
        f"IN: '{path}' is no {kind} checkpoint: neither it nor the folder that its file '{pointer}' names holds "
        "mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt; give the folder that was saved to"
    )


def _pointed(path: Path, pointer: str) -> Path | None:
    """The folder that the file ``pointer`` names; None if there is no such file.

    Raises:
        UserError: the file is a pointer or a web page, or names something outside of its folder.
    """
    try:
        data = (path / pointer).read_bytes()
        name = decode(data).strip()
    except (OSError, ValueError):
        return None
    other = text_instead(data)
    if other is not None:
        raise UserError(f"IN: '{path / pointer}' is not what its name says: {other}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"IN: '{path / pointer}' names {shown(name)}, outside of its folder; give the folder itself")
    return path / name


def model_files(folder: Path) -> list[Path]:
    """The model files by data-parallel rank (all of them at ZeRO-3, else the only one).

    Raises:
        UserError: the model was cut by tensor or pipeline parallelism.
    """
    matches = {file: match for file in folder.iterdir() if (match := _MODEL.fullmatch(file.name))}
    if any(folder.glob("layer_*_model_states.pt")) or any(int(match[2]) for match in matches.values()):
        raise UserError(
            f"IN: '{folder}' is of a model cut by tensor or pipeline parallelism; join its parts with DeepSpeed's "
            "ds_to_universal and read the result with --from deepspeed-universal"
        )
    return sorted(matches, key=lambda file: int(matches[file][1] or 0))


def model_state(file: Path) -> dict[str, Any]:
    """What a model file holds.

    Raises:
        UserError: it is none.
    """
    state = load_file(file)
    if not isinstance(state, dict) or "module" not in state or "global_steps" not in state:
        raise UserError(f"{file}: is no model file of DeepSpeed; give a folder written by engine.save_checkpoint")
    return state


def read_checkpoint(path: Path, pointer: str, kind: str, read: Callable[[Path], Contents]) -> Contents:
    """What ``read`` makes of the folder that holds the files, under the names of the model's own.

    DeepSpeed's files hold trees of its own making, without a scheme that they could be held against beforehand: what
    is not where it writes it is refused in a sentence.

    Raises:
        UserError: no such checkpoint is there, something in its trees is missing or of another kind, two names become
            one, or it is not clear which of several models is meant.
    """
    folder = find_folder(path, pointer, kind)
    try:
        contents = read(folder)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{kind} checkpoint '{folder}': lacks what DeepSpeed 0.19 writes ({' '.join(repr(error).split())[:200]}); "
            "save it anew with a present DeepSpeed, or convert it with its zero_to_fp32.py"
        ) from error
    names, notes = plain_names(contents.shapes, contents.description)
    if all(new == old for new, old in names.items()) and len(names) == len(contents.shapes):
        return contents
    shapes = {new: contents.shapes[old] for new, old in names.items()}
    notes = [*contents.notes, *notes]
    return replace(
        contents, shapes=shapes, read=lambda kind, name: contents.read(kind, names[name]), notes=tuple(notes)
    )


def check_tensors(values: Iterable[Any]) -> None:
    """Raise TypeError for what is no dense tensor of real numbers, and so no weights and no moments."""
    for value in values:
        if not isinstance(value, Tensor) or odd_kind(value) is not None or value.is_complex():
            raise TypeError(f"a {type(value).__name__} stands where a dense tensor of real numbers belongs")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape that a file says of a parameter. Raises TypeError for what is none."""
    if not isinstance(value, list | tuple) or not all(type(size) is int and size >= 0 for size in value):
        raise TypeError(f"a {type(value).__name__} stands where a shape belongs")
    return tuple(value)


def version_of(state: Mapping[str, Any]) -> str:
    """``DeepSpeed 0.19.8``, as the file says."""
    version = state.get("ds_version")
    return f"DeepSpeed {version if isinstance(version, str) and version else 'of unknown version'}"


def position_of(state: Mapping[str, Any]) -> Position:
    """Where the run of a model file stood. Raises UserError for what is no number of steps."""
    return Position(*(_count(state, key) for key in ("global_steps", "global_samples", "skipped_steps")))


def _count(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if value is not None and (not isinstance(value, int | float) or not 0 <= value < 2**63):
        raise UserError(f"IN: its {key} is {shown(value)} and not a number of steps; use an earlier checkpoint")
    return int(value or 0)


def adam_step(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], outer: Any = None
) -> tuple[int, str]:
    """How many updates Adam counted, or why its state cannot be used."""
    if not any(states):
        return 0, "the optimizer has taken no step, or its state was not saved"
    incomplete = next((state for state in states if not all(isinstance(state.get(k), Tensor) for k in MOMENTS)), None)
    if incomplete is not None:
        return 0, f"the optimizer is not Adam (its state: {', '.join(map(str, incomplete)) or 'none'})"
    known = [state["step"] for state in states if "step" in state]
    known = known or [group["step"] for group in groups if "step" in group] or ([] if outer is None else [outer])
    known = [step.item() if isinstance(step, Tensor) and step.numel() == 1 else step for step in known]
    if not all(isinstance(step, int | float) and 0 <= step < 2**63 for step in known):
        return 0, "Adam's step counters are no numbers"
    steps = {int(step) for step in known}
    if len(steps) != 1:
        return 0, f"Adam's step counters are {sorted(steps) or 'missing'}, and not one number"
    return steps.pop(), ""
