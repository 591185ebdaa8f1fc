"""Which studies back the transfer of which base hyperparameter, and over what span of which scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.search.apply.untransferred import Range
from megadit.search.results import StudyResults
from megadit.search.verify_study import verify_study
from megadit.transfer.verdict import Verdict

TRANSFERS = "transfers"


@dataclass(frozen=True)
class Backing:
    """One study's word on the transfer of ``hp``. ``verdict`` is None where it has none, and ``why`` says why not."""

    results: StudyResults
    hp: str
    verdict: Verdict | None
    why: str = ""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.results.study.spec.name

    @property
    def answer(self) -> str:
        """The verdict in words: one of the three, or that there is none."""
        return f"no verdict: {self.why}" if self.verdict is None else self.verdict.verdict

    @property
    def transfers(self) -> bool:
        """Whether the verdict is "transfers"."""
        return self.verdict is not None and self.verdict.verdict == TRANSFERS

    @property
    def span(self) -> Range | None:
        """The scales over which it transfers, exceptions left out; None where it does not."""
        scale = self.results.study.spec.scale
        if self.verdict is None or not self.transfers or scale is None:
            return None
        judged = [entry.scale for entry in self.verdict.scales if not entry.exception]
        return Range(scale.key, min(judged), max(judged), self.name)


def backings(
    results: StudyResults, others: Sequence[StudyResults], score: str, variant: str, force: bool
) -> tuple[Backing, ...]:
    """The verdicts of the study itself, where it has a scale, and of the studies that are named as verifying it.

    A grid over several keys has one for each that has an order and is positive.

    Raises:
        UserError: another study's runs have another base width or family, it has no scale, or it is incomplete;
            with ``force`` an incomplete study has no verdict, and why.
    """
    found: list[Backing] = []
    if results.study.spec.scale is not None:
        found += _judge(results, score, variant, force)
    ours = _judged_config(results)
    for other in others:
        theirs = _judged_config(other)
        for key in ("family", "parametrization", "base_width"):
            one, two = getattr(ours.model, key), getattr(theirs.model, key)
            if one != two:
                raise UserError(
                    f"--verified-by: study {other.study.spec.name} has model.{key} {two}, but study "
                    f"{results.study.spec.name} has {one}; name a study that shares it"
                )
        found += _judge(other, None, None, force)
    return tuple(found)


def backed_by(key: str, found: Sequence[Backing]) -> list[Backing]:
    """The studies that verified the transfer of ``key``."""
    return [backing for backing in found if backing.transfers and backing.hp == key]


def _judge(results: StudyResults, score: str | None, variant: str | None, force: bool) -> list[Backing]:
    space = results.study.space
    ordered = [d.key for d in space.dimensions if d.numeric and min(d.values) > 0]
    found = []
    for key in ordered or space.keys[:1]:
        try:
            found.append(Backing(results, key, verify_study(results, score, variant, hp=key)))
        except UserError as error:
            if not force:
                raise
            found.append(Backing(results, key, None, str(error)))
    return found


def _judged_config(results: StudyResults) -> RunConfig:
    """A run of the judged variant: what all runs of it share."""
    study = results.study
    cell = next(cell for cell in study.cells if cell.variant == study.variants[0])
    return study.config(cell, next(study.space.corners()), study.spec.seeds[0])
