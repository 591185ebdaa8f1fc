"""Class names of a run, from its directory, and the choice of classes on a command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from megadit.config.json_text import parse_json
from megadit.errors import UserError

CLASSES_FILE, NOTICE_FILE = "classes.json", "DATA-NOTICE.txt"


def read_classes(run_dir: Path) -> list[str]:
    """Class names by label, a JSON list; empty if the run has none. Raises UserError if it is something else."""
    path = run_dir / CLASSES_FILE
    if not path.is_file():
        return []
    try:
        names = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as class names ({reason}); remove it to use numbers") from None
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f"{path}: is not a list of class names; remove it to use numbers")
    return [str(name) for name in names]


def read_notice(run_dir: Path) -> str:
    """Attribution of the data that the run was trained on; empty if none is asked for."""
    path = run_dir / NOTICE_FILE
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def resolve_classes(text: str | None, names: Sequence[str], count: int) -> list[int] | None:
    """Labels of a comma-separated choice of labels and names (case does not matter); None if nothing is chosen.

    Raises UserError for an unknown name, a label outside 0...count - 1, or an unconditional model (count 0).
    """
    if text is None:
        return None
    if count == 0:
        raise UserError(f"--classes: {text} cannot be chosen, the model is unconditional; leave --classes out")
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen:
        raise UserError("--classes: is empty; give labels or names, or leave it out")
    return [_resolve(part, names, count) for part in chosen]


def _resolve(part: str, names: Sequence[str], count: int) -> int:
    folded = [name.casefold() for name in names]
    if part.casefold() in folded:  # before numbers: the classes of digits are named by digits
        return folded.index(part.casefold())
    if part.removeprefix("-").isdecimal():
        if 0 <= int(part) < count:
            return int(part)
        raise UserError(f"--classes: {part} is not a label of this model; labels are 0 to {count - 1}")
    near = difflib.get_close_matches(part.casefold(), folded, n=1)
    hint = f"did you mean {names[folded.index(near[0])]}?" if near else f"known are {_some(names, count)}"
    raise UserError(f"--classes: {part} is not a class of this model; {hint}")


def _some(names: Sequence[str], count: int) -> str:
    if not names:
        return f"the labels 0 to {count - 1}"
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
