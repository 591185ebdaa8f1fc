"""What a report concludes from a study's results: a verdict on each variant and searched key, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megadit.errors import UserError
from megadit.search.report.rendering import Badge
from megadit.search.results import StudyResults
from megadit.search.selection import SelectedPoint, select
from megadit.search.verify_study import proxy_of, verify_study
from megadit.transfer.verdict import TransferVerdict

VERDICT_BADGES = {"transfers": "good", "does not transfer": "bad", "inconclusive": "unsure"}


@dataclass(frozen=True)
class Findings:
    """The verdict on each (variant, searched key), or why there is none and for which of them; the choice likewise.

    ``chosen_at``: the scale of the choice, where ``apply`` chooses too.
    """

    verdicts: Mapping[tuple[str, str], TransferVerdict]
    no_verdict: Mapping[str, list[str]]
    choice: SelectedPoint | None
    no_choice: str
    chosen_at: int | None


def conclude(results: StudyResults) -> Findings:
    """Judge every variant and searched key, and choose a point, by the study's own score and rule."""
    verdicts: dict[tuple[str, str], TransferVerdict] = {}
    missing: dict[str, list[str]] = {}
    score = results.study.spec.selection_score.name
    for variant in results.study.variants if results.study.spec.scale is not None else ():
        for key in results.study.space.keys:
            try:
                verdicts[variant, key] = verify_study(results, score, variant, hp=key)
            except UserError as reason:
                missing.setdefault(str(reason), []).append(judged_text(variant, key))
    judged = (verdict for (variant, _), verdict in verdicts.items() if variant == results.study.variants[0])
    scale = proxy_of(results, next(judged, None))
    try:
        return Findings(verdicts, missing, select(results, scale=scale), "", scale)
    except UserError as reason:
        return Findings(verdicts, missing, None, str(reason), scale)


def judged_text(variant: str, key: str) -> str:
    """What a verdict is on: ``optim.lr under sp``."""
    return f"{key} under {variant}" if variant else key


def badges(results: StudyResults, findings: Findings) -> list[Badge]:
    """The verdicts on the judged variant, and the state of the study."""
    judged = results.study.variants[0]
    shown = [
        Badge(f"{judged_text(variant, key)}: {found.verdict}", VERDICT_BADGES[found.verdict])
        for (variant, key), found in findings.verdicts.items()
        if variant == judged
    ]
    if not shown and results.study.spec.scale is not None:
        shown = [Badge("no verdict")]
    if results.complete:
        return [*shown, Badge("complete")]
    return [*shown, Badge(f"incomplete: {len(results.trials)} of {results.planned} trials have ended", "unsure")]
