"""Where ``launch/sample.py`` may write its pictures; needs no torch, since it is asked before the work."""

from __future__ import annotations

import os
from pathlib import Path

from megadit.errors import UserError
from megadit.files.paths import ARRAYS, PNG, check_output


def check_outputs(grid: Path, npz: Path | None) -> None:
    """Refuse, before the work, what could not be written after it, or would replace what is no earlier result.

    Raises:
        UserError: one is a folder, cannot be written, is a file of another kind, or both are one.
    """
    check_output(grid, "--out", "PNG picture", PNG)
    if npz is not None:
        check_output(npz, "--npz", "file of pictures", ARRAYS)
        if npz.absolute() == grid.absolute():
            raise UserError(f"--npz: '{npz}' is where --out writes the grid; give it a name of its own")
    for path, key, suffix in ((grid, "--out", ".png"), (npz, "--npz", ".npz")):
        if path is not None and path.suffix.lower() != suffix and not path.is_dir():
            raise UserError(f"{key}: '{path}' does not end in {suffix}, the one format that is written; rename it")
    for path in (grid, npz):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{path}: {existing} is not a folder that can be written; choose another place")
