"""Folders of the Hugging Face hub's cache, which people name in place of the snapshot in them, or copy by halves."""

from __future__ import annotations

import os
from pathlib import Path


def snapshot_of(folder: Path) -> str | None:
    """The remedy where ``folder`` is a model's folder in the cache (``models--OWNER--NAME``); None where it is not.

    The snapshot is that of ``refs/main``, else the last one by name.
    """
    if not (folder / "snapshots").is_dir():
        return None
    snapshots = sorted(inner for inner in (folder / "snapshots").iterdir() if inner.is_dir())
    if not snapshots:
        return "is a cache of the Hugging Face hub without a snapshot; download the model again"
    try:
        with open(folder / "refs" / "main", encoding="utf-8") as file:
            main = file.read(256).strip()
    except (OSError, ValueError):
        main = ""
    meant = next((inner for inner in snapshots if inner.name == main), snapshots[-1])
    return f"is a cache of the Hugging Face hub; give its snapshot '{meant}'"


def broken_link(path: Path) -> str | None:
    """What is wrong where ``path`` is a link to nothing, as in a snapshot copied alone; None where it is not."""
    if not path.is_symlink() or path.exists():
        return None
    return f"is a link to '{os.readlink(path)}', which is missing; copy with what links point to (cp -L)"
