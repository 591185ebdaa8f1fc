"""Check at the start that all ranks have the same configuration, code, libraries and data.

Ranks that differ would deadlock in some collective, or train something else than was configured.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megadit import __version__
from megadit.errors import UserError
from megadit.files.text import name_bytes
from megadit.parallel.processes import ProcessContext
from megadit.plugins import loaded_plugins

_SHOWN = 4  # differences that the error names


def check_consistency(context: ProcessContext, facts: Mapping[str, Any]) -> None:
    """Compare ``facts`` (name -> plain value), the code and the plugins over all ranks (collective).

    Raises:
        UserError: on every rank; it names what differs, the values and the ranks that have them.
    """
    if context.world_size == 1:
        return
    local = {**facts, **code_facts(), **{f"plugin {plugin.name}": str(plugin) for plugin in loaded_plugins()}}
    digest = hashlib.sha256(json.dumps(local, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(context.gather_objects(digest))) == 1:
        return
    different = rank_differences(context.gather_objects({key: _short(value) for key, value in local.items()}))
    more = f", and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise UserError(
        f"ranks differ: {'; '.join(different[:_SHOWN])}{more}; start all of them with the same configuration, data and "
        "installation",
        everywhere=True,
    )


def rank_differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """What differs between the ranks' facts, each as a part of a sentence with values and ranks."""
    parts = []
    for key in sorted({key for of_rank in facts for key in of_rank}):
        holders: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(facts):
            holders.setdefault(of_rank.get(key, "missing"), []).append(rank)
        if len(holders) > 1:
            parts.append(f"{key} is " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    return parts


@cache
def code_facts() -> dict[str, str]:
    """Versions of megadit, torch and DeepSpeed, and a short digest of every source file of megadit, by its name."""
    facts = {"megadit": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    for package in ("megadit", "megadit_kernels"):
        root = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(root.rglob("*.py")):
            facts[f"source {root.name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return facts


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:40]}… ({hashlib.sha256(name_bytes(text)).hexdigest()[:8]})"


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
