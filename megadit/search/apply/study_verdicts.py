"""Which studies back the transfer of which base hyperparameter, and over what span of which scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megadit.errors import UserError
from megadit.search.apply.untransferred import VerifiedRange
from megadit.search.results import StudyResults
from megadit.search.verify_study import verify_study
from megadit.transfer.verdict import TransferVerdict


@dataclass(frozen=True)
class StudyVerdict:
    """One study's word on the transfer of ``hp``. ``verdict`` is None where it has none, and ``why`` says why not."""

    results: StudyResults
    hp: str
    verdict: TransferVerdict | None
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
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is what it is; none where there is no verdict."""
        return () if self.verdict is None else self.verdict.reasons

    @property
    def span(self) -> VerifiedRange | None:
        """The scales over which it transfers, exceptions left out; None where the verdict is not "transfers"."""
        scale = self.results.study.spec.scale
        if self.verdict is None or self.verdict.verdict != "transfers" or scale is None:
            return None
        judged = [entry.scale for entry in self.verdict.scales if not entry.exception]
        return VerifiedRange(scale.key, min(judged), max(judged), self.name)

    def to_json(self) -> dict[str, Any]:
        """The verdict, its reasons and the range that it covers, as ``apply --json`` prints them per study."""
        span = self.span
        return {
            "study": self.name,
            "verdict": None if self.verdict is None else self.verdict.verdict,
            "why": self.why or None,
            "hp": self.hp,
            "reasons": list(self.reasons),
            "verified": None if span is None else {"key": span.key, "low": span.low, "high": span.high},
        }


def study_verdicts(results: StudyResults, others: Sequence[StudyResults], force: bool) -> tuple[StudyVerdict, ...]:
    """The verdicts of the study itself, where it has a scale, and of the studies that are named as verifying it.

    A grid over several keys has one for each that has an order and is positive.

    Raises:
        UserError: another study's runs have another base width or family, it has no scale, or it is incomplete;
            with ``force`` an incomplete study has no verdict, and why.
    """
    # The model of a run of the first variant, which is the judged one.
    ours, *models = [each.study.first_run(each.study.cells[0]).model for each in (results, *others)]
    for other, theirs in zip(others, models, strict=True):
        for key in ("family", "parametrization", "base_width"):
            one, two = getattr(ours, key), getattr(theirs, key)
            if one != two:
                raise UserError(
                    f"--verified-by: study {other.study.spec.name} has model.{key} {two}, but study "
                    f"{results.study.spec.name} has {one}; name a study that shares it"
                )
    judged = [results, *others] if results.study.spec.scale is not None else others
    return tuple(verdict for each in judged for verdict in _judge(each, force))


def _judge(results: StudyResults, force: bool) -> Iterator[StudyVerdict]:
    space = results.study.space
    ordered = [d.key for d in space.dimensions if d.numeric and min(d.values) > 0]
    for key in ordered or space.keys[:1]:
        try:
            yield StudyVerdict(results, key, verify_study(results, hp=key))
        except UserError as error:
            if not force:
                raise
            yield StudyVerdict(results, key, None, str(error))
