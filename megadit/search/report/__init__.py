"""The report of a study: one self-contained HTML page, and markdown with its figures beside it."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable
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
from megadit.search.report.rendering import render
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
    """The content of a report. By anchor of a section: its heading, and what is drawn in it."""

    data: ReportData
    sections: dict[str, str]
    figures: dict[str, list[Figure]]

    @property
    def drawn(self) -> list[Figure]:
        """All figures, in the order of the report."""
        return [figure for group in self.figures.values() for figure in group]

    def render(self, form: str) -> str:
        """The report as html or md."""
        study = self.data.results.study
        values = {
            **vars(self),
            "tables": tables,
            "subject": subject,
            "study_keys": dump_yaml(study.spec.model_dump(mode="json", exclude={"base"}, exclude_defaults=True)),
            "folder": shlex.quote(display(study.folder)),
            "footer": f"Written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by megadit {__version__}.",
        }
        return render(form, values)


def compose(results: StudyResults) -> StudyReport:
    """The report's content: which sections it has, and their figures."""
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
    drawings: dict[str, Callable[[], list[Figure | None]]] = {
        "curves": lambda: [plots.curve_figure(data, key) for key in data.keys],
        "importance": lambda: [plots.importance_figure(data)],
        "slices": lambda: [
            draw(data, variant) for variant in data.variants for draw in (plots.slice_figure, plots.parallel_figure)
        ],
    }
    sections = {
        anchor: heading for anchor, (heading, shown) in headings.items() if shown and (ended or anchor not in drawings)
    }
    with plots.figure_style():
        figures = {anchor: list(filter(None, draw())) for anchor, draw in drawings.items() if anchor in sections}
    return StudyReport(data, sections, figures)


def _write_plots(folder: Path, figures: list[Figure]) -> None:
    """The figures as PNG files; those of an earlier report that this one has not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        with atomic_write(folder / f"{figure.name}.png") as temporary:
            figure.save(temporary, dpi=130, format="png")
    for old in {*folder.glob("*.png")} - {folder / f"{figure.name}.png" for figure in figures}:
        if old.name.startswith(("curves-", "slices", "parallel", "importance")):
            old.unlink(missing_ok=True)
