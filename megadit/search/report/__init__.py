"""The report of a study: one self-contained HTML page, and markdown with its figures beside it."""

from __future__ import annotations

import datetime
import shlex
from dataclasses import dataclass
from pathlib import Path

from megadit import __version__
from megadit.config.loading.sources import display
from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.text import replace_surrogates
from megadit.files.yaml_text import dump_yaml
from megadit.search.report import plots, tables
from megadit.search.report.data import ReportData, analyse, subject
from megadit.search.report.plots import Figure
from megadit.search.report.rendering import Badge, render
from megadit.search.results import StudyResults
from megadit.search.storage.store import load_results

__all__ = ["compose", "write_report"]


def write_report(source: str | Path) -> tuple[Path, Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.png`` into the directory of the study ``source``.

    A study that is still running, or has no finished trial yet, gets a report that says so. Each file is replaced
    whole.

    Returns:
        The paths of the page and of the markdown.

    Raises:
        UserError: there is no study, or its directory cannot be written.
    """
    return write_results(load_results(source))


def write_results(results: StudyResults) -> tuple[Path, Path]:
    """``write_report`` of results in memory."""
    folder = results.study.folder
    report = compose(results)
    page, markdown = folder / "report.html", folder / "report.md"
    try:
        _write_plots(folder / "plots", report.drawn)
        for path in (page, markdown):
            with atomic_write(path) as temporary:
                temporary.write_bytes(replace_surrogates(report.render(path.suffix[1:])).encode())
    except OSError as error:
        raise UserError(f"--study_dir: cannot write the report into '{folder}' ({error.strerror})") from None
    return page, markdown


@dataclass(frozen=True)
class StudyReport:
    """The content of a report. By anchor of a section: its heading, its figures, and why it has none."""

    data: ReportData
    badges: list[Badge]
    sections: dict[str, str]
    figures: dict[str, list[Figure]]
    no_figures: dict[str, str]

    @property
    def drawn(self) -> list[Figure]:
        """All figures, in the order of the report."""
        return [figure for group in self.figures.values() for figure in group]

    def render(self, form: str) -> str:
        """The report as html or md."""
        study = self.data.results.study
        keys = study.spec.model_dump(mode="json", exclude={"base"}, exclude_defaults=True)
        values = {
            **vars(self),
            "title": f"Study {study.spec.name}",
            "question": study.spec.description,
            "tables": tables,
            "subject": subject,
            "study_keys": dump_yaml(keys),
            "folder": shlex.quote(display(study.folder)),
            "footer": f"Written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by megadit {__version__}.",
        }
        return render(form, values)


def compose(results: StudyResults) -> StudyReport:
    """The report's content: which sections it has, their figures and the badges above them."""
    spec, data = results.study.spec, analyse(results)
    ended, several = bool(results.trials), len(data.keys) > 1
    side = ", variants side by side" if len(results.study.variants) > 1 else ""
    headings = {
        "overview": ("Overview", True),
        "verdict": ("Verdict", spec.scale is not None),
        # where all combinations of values were run
        "curves": (f"{data.score} against {' and '.join(data.keys)}{side}", not several or spec.sampler == "grid"),
        "best": ("Best trials", ended),
        "importance": ("Importance", several),
        "slices": ("Slices and parallel coordinates", several),
        "scores": ("Do the scores agree?", ended and len(spec.scores) > 1),
        "failures": ("Failures", True),
        "cost": ("Cost", True),
        "study": (f"Study {spec.name}", True),
    }
    drawn = ("curves", "importance", "slices")
    sections = {
        anchor: heading for anchor, (heading, shown) in headings.items() if shown and (ended or anchor not in drawn)
    }
    figures: dict[str, list[Figure | None]] = {}
    no_figures = dict.fromkeys(drawn, f"No trial has a value of {data.score} yet, so there is nothing to draw.")
    with plots.figure_style():
        if "curves" in sections:
            figures["curves"] = [plots.curve_figure(data, key) for key in data.keys]
        if "slices" in sections:
            importance = plots.importance_figure(data)
            if isinstance(importance, str):
                no_figures["importance"] = importance
            else:
                figures["importance"] = [importance]
            both = (plots.slice_figure, plots.parallel_figure)
            figures["slices"] = [draw(data, variant) for variant in data.variants for draw in both]
    present = {anchor: [figure for figure in group if figure] for anchor, group in figures.items()}
    return StudyReport(data, tables.badges(data), sections, present, no_figures)


def _write_plots(folder: Path, figures: list[Figure]) -> None:
    """The figures as PNG files; those of an earlier report that this one has not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        with atomic_write(folder / f"{figure.name}.png") as temporary:
            figure.save(temporary, dpi=130, format="png")
    current = {f"{figure.name}.png" for figure in figures}
    for old in folder.glob("*.png"):
        if old.name not in current and old.name.startswith(("curves-", "slices", "parallel", "importance")):
            old.unlink(missing_ok=True)
