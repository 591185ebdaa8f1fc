"""Whether a study file still describes the study that a directory holds: it may have grown, not changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.nested import flatten
from megadit.search.study.spec import LISTED, DimensionSpec, StudySpec

# How runs are made and chosen, not what they are.
_FREE = {"description", "plugins", "workers", "select", "keep", "max_attempts", "stale_after_s"}
# Part of the base configuration once it is resolved; compared there.
_RESOLVED = {"base", "overrides", "proxy"}
_GROWING = "only more seeds, trials, grid values and scale values, workers, selection and keep may differ"


def check_extends(
    new: StudySpec, new_base: RunConfig, old: StudySpec, old_base: RunConfig, folder: Path, horizons: bool
) -> None:
    """Raises UserError that names what differs between ``new`` and the ``old`` study in ``folder`` beyond growth.

    ``horizons``: one run scores every step count of the scale, so that another count would need other runs.
    """
    differing = [key for key in StudySpec.model_fields if key not in _FREE | _RESOLVED and not _grown(key, new, old)]
    if horizons and "scale" not in differing and new.scale != old.scale:
        differing.append("scale")
    after, before = _flat_base(new, new_base), _flat_base(old, old_base)
    differing += [key for key in {**before, **after} if after.get(key) != before.get(key)]
    if differing:
        raise UserError(
            f"--study_dir: '{folder}' holds another study (different: {', '.join(differing)}); {_GROWING}, so "
            "choose another --study_dir"
        )


def _grown(key: str, new: StudySpec, old: StudySpec) -> bool:
    """Whether ``key`` is the same, or has grown where it may."""
    after, before = getattr(new, key), getattr(old, key)
    if after == before or after is None or before is None:
        return after == before
    if key == "seeds":
        return new.sampler != "tpe" and set(after) >= set(before)
    if key == "trials":
        return after >= before
    if key == "scale":
        return after.key == before.key and set(after.values) >= set(before.values)
    if key == "space":
        return list(after) == list(before) and all(_wider(after[name], before[name], new.sampler) for name in after)
    return False


def _wider(after: DimensionSpec, before: DimensionSpec, sampler: str) -> bool:
    """A list may only grow where every point of it is run: elsewhere it would change the points already drawn."""
    if after == before:
        return True
    grown = set(map(repr, after.values)) >= set(map(repr, before.values))
    return sampler == "grid" and after.kind == before.kind and after.kind in LISTED and grown


def _flat_base(spec: StudySpec, base: RunConfig) -> dict[str, Any]:
    """The base without the scaled key, of which it holds the proxy's value, which may move as the scale grows."""
    values = flatten(base.model_dump(mode="json", exclude={"plugins"}))
    if spec.scale is not None:
        del values[spec.scale.key]
    return values
