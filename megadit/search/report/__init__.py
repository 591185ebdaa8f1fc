"""The report of a study: one self-contained HTML page, and markdown with its figures beside it."""

from __future__ import annotations

import datetime
from pathlib import Path

from megadit import __version__
from megadit.errors import UserError
from megadit.files.paths import whole_file
from megadit.files.text import whole_text
from megadit.search.report.blocks import Document, Figure
from megadit.search.report.ledger import agreement_section, cost_section, failures_section, study_section
from megadit.search.report.points import Gathered
from megadit.search.report.sections import (
    badges,
    best_section,
    conclude,
    curves_section,
    importance_section,
    overview,
    slices_section,
    verdict_section,
)
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
    from megadit.search.report import html, markdown

    folder = results.study.folder
    document = compose(results)
    figures = [b for section in document.sections for b in section.blocks if isinstance(b, Figure)]
    page, text = folder / "report.html", folder / "report.md"
    try:
        _write_plots(folder / "plots", figures)
        _write(page, whole_text(html.render(document)).encode())
        _write(text, whole_text(markdown.render(document)).encode())
    except OSError as error:
        raise UserError(f"--study_dir: cannot write the report into '{folder}' ({error.strerror})") from None
    return page, text


def compose(results: StudyResults) -> Document:
    """What the report says, before it is written as anything."""
    spec = results.study.spec
    gathered = Gathered(results, spec.selection_score.name)
    findings = conclude(results)
    sections = (
        overview(gathered, findings),
        verdict_section(gathered, findings),
        curves_section(gathered, findings) if results.trials else None,
        best_section(gathered) if results.trials else None,
        importance_section(gathered) if results.trials else None,
        slices_section(gathered) if results.trials else None,
        agreement_section(gathered) if results.trials else None,
        failures_section(gathered),
        cost_section(gathered),
        study_section(gathered),
    )
    now = datetime.datetime.now(datetime.UTC)
    return Document(
        title=f"Study {spec.name}",
        question=spec.description,
        badges=badges(results, findings),
        sections=tuple(section for section in sections if section is not None),
        footer=f"Written {now:%Y-%m-%d %H:%M} UTC by megadit {__version__}.",
    )


def _write_plots(folder: Path, figures: list[Figure]) -> None:
    """The figures as PNG files; those of an earlier report that this one has not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{figure.name}.png" for figure in figures}
    for figure in figures:
        with whole_file(folder / f"{figure.name}.png") as temporary:
            figure.canvas.savefig(temporary, dpi=130, format="png")
    for old in folder.glob("*.png"):
        if old.name not in wanted and old.name.startswith(("curves-", "slices", "parallel", "importance")):
            old.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
