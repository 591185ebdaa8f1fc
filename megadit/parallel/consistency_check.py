"""Whether all ranks are about to run the same thing: configuration, code, libraries and data, compared at the start.

Ranks that differ would wait for each other for ever in some collective, or train something that nobody asked for.
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

_TOLD = 4  # differences that the error names


def check_consistency(context: ProcessContext, facts: Mapping[str, Any]) -> None:
    """Compare ``facts`` (name -> plain value), the code and the plugins over all ranks (collective).

    Raises:
        UserError: on every rank; it names what differs, the values and the ranks that hold them.
    """
    if context.world_size == 1:
        return
    own = {**facts, **code_facts(), **{f"plugin {plugin.name}": str(plugin) for plugin in loaded_plugins()}}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(context.gather_objects(digest))) == 1:
        return
    found = differences(context.gather_objects({key: _shown(value) for key, value in own.items()}))
    more = f", and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    raise UserError(
        f"ranks differ: {'; '.join(found[:_TOLD])}{more}; start all of them with the same configuration, data and "
        "installation",
        everywhere=True,
    )


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """What differs between the ranks' facts, one sentence part each: the values and the ranks that hold them."""
    told = []
    for key in sorted({key for own in facts for key in own}):
        holders: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            holders.setdefault(own.get(key, "missing"), []).append(rank)
        if len(holders) > 1:
            told.append(f"{key} is " + ", ".join(f"{value} on {_ranks(who)}" for value, who in holders.items()))
    return told


@cache
def code_facts() -> dict[str, str]:
    """Versions of megadit, torch and DeepSpeed, and a short digest of every source file of megadit, by its name."""
    facts = {"megadit": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    for package in ("megadit", "megadit_kernels"):
        root = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(root.rglob("*.py")):
            facts[f"source {root.name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return facts


def _shown(value: Any) -> str:
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
