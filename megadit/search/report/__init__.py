"""The report of a study: one self-contained HTML page, and markdown with its figures beside it."""

from __future__ import annotations

import datetime
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit import __version__
from megadit.config.loading.sources import display
from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.text import replace_surrogates
from megadit.files.yaml_text import dump_yaml
from megadit.search.report import tables
from megadit.search.report.curves import curve_figure
from megadit.search.report.figure import Figure
from megadit.search.report.findings import Findings, badges, conclude, judged_text
from megadit.search.report.plots import importance_figure, parallel_figure, slice_figure
from megadit.search.report.points import Gathered
from megadit.search.report.rendering import Badge, render
from megadit.search.results import StudyResults
from megadit.search.storage.store import load_results

__all__ = ["compose", "write_report"]


def write_report(source: str | Path) -> tuple[Path, Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.png`` into the directory of the study ``source``.

    A study that runs on, or has no finished trial yet, gets a report that says so. Each file appears whole or not.

    Returns:
        The paths of the page and of the markdown.

    Raises:
        UserError: there is no study, or its directory cannot be written.
    """
    return write_results(load_results(source))


def write_results(results: StudyResults) -> tuple[Path, Path]:
    """The same from results in memory."""
    folder = results.study.folder
    report = compose(results)
    page, text = folder / "report.html", folder / "report.md"
    try:
        _write_plots(folder / "plots", report.drawn)
        for path in (page, text):
            with atomic_write(path) as temporary:
                temporary.write_bytes(replace_surrogates(report.render(path.suffix[1:])).encode())
    except OSError as error:
        raise UserError(f"--study_dir: cannot write the report into '{folder}' ({error.strerror})") from None
    return page, text


@dataclass(frozen=True)
class Report:
    """What the templates of a report are filled in with: ``sections`` and ``figures`` are by anchor."""

    gathered: Gathered
    findings: Findings
    badges: list[Badge]
    sections: dict[str, str]
    figures: dict[str, list[Figure]]
    no_importance: str

    @property
    def drawn(self) -> list[Figure]:
        """All figures, in the order of the report."""
        return [figure for group in self.figures.values() for figure in group]

    def render(self, form: str) -> str:
        """The report as html or md."""
        study = self.gathered.results.study
        keys = study.spec.model_dump(mode="json", exclude={"base"}, exclude_defaults=True)
        now = datetime.datetime.now(datetime.UTC)
        values: dict[str, Any] = {
            **vars(self),
            "title": f"Study {study.spec.name}",
            "question": study.spec.description,
            "tables": tables,
            "judged_text": judged_text,
            "study_keys": dump_yaml(keys),
            "folder": shlex.quote(display(study.folder)),
            "footer": f"Written {now:%Y-%m-%d %H:%M} UTC by megadit {__version__}.",
        }
        return render(form, values)


def compose(results: StudyResults) -> Report:
    """What the report says and draws, before it is written as anything."""
    spec, variants = results.study.spec, results.study.variants
    gathered, findings = Gathered(results, spec.selection_score.name), conclude(results)
    keys, ended = gathered.keys, bool(results.trials)
    figures: dict[str, list[Figure | None]] = {}
    no_importance = ""
    sections = {"overview": "Overview"} | ({"verdict": "Verdict"} if gathered.scaled else {})
    if ended and (len(keys) == 1 or spec.sampler == "grid"):  # all combinations were run
        side = ", variants side by side" if len(variants) > 1 else ""
        sections["curves"] = f"{gathered.score} against {' and '.join(keys)}{side}"
        for key in keys:
            judged = {variant: verdict for (variant, of), verdict in findings.verdicts.items() if of == key}
            figures.setdefault("curves", []).append(curve_figure(gathered, key, judged))
    if ended:
        sections["best"] = "Best trials"
    if ended and len(keys) > 1:
        sections |= {"importance": "Importance", "slices": "Slices and parallel coordinates"}
        bars = importance_figure(gathered)
        figures["importance"] = [] if isinstance(bars, str) else [bars]
        no_importance = bars if isinstance(bars, str) else ""
        figures["slices"] = [draw(gathered, v) for v in gathered.variants for draw in (slice_figure, parallel_figure)]
    if ended and len(spec.scores) > 1:
        sections["scores"] = "Do the scores agree?"
    sections |= {"failures": "Failures", "cost": "Cost", "study": f"Study {spec.name}"}
    drawn = {anchor: [figure for figure in group if figure] for anchor, group in figures.items()}
    return Report(gathered, findings, badges(results, findings), sections, drawn, no_importance)


def _write_plots(folder: Path, figures: list[Figure]) -> None:
    """The figures as PNG files; those of an earlier report that this one has not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{figure.name}.png" for figure in figures}
    for figure in figures:
        with atomic_write(folder / f"{figure.name}.png") as temporary:
            figure.canvas.savefig(temporary, dpi=130, format="png")
    for old in folder.glob("*.png"):
        if old.name not in wanted and old.name.startswith(("curves-", "slices", "parallel", "importance")):
            old.unlink(missing_ok=True)
