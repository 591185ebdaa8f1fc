"""Verdicts on tables: a CSV file with a column for the scale, the hyperparameter and the score, one run a row.

A column whose name begins with ``log2_`` holds exponents; other columns hold positive values. A score that is NaN,
infinite or says "diverged" is a run that diverged; an empty one was not measured and is left out.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config.schema.values import parse_number
from megadit.errors import UserError, did_you_mean
from megadit.files.text import decode_text
from megadit.transfer.ties import nearest, same_hps
from megadit.transfer.verdict import Limits, RunScore, TransferVerdict, judge

_LOWER = {"loss", "fid", "sfid", "kid", "fdd", "cmmd", "mse", "mae", "rmse", "error", "nll", "perplexity", "ppl", "bpd"}
_HIGHER = {"inception", "is", "precision", "recall", "geneval", "clip", "clipscore", "accuracy", "acc", "psnr", "ssim"}
_HIGHER |= {"reward", "preference", "win", "density", "coverage", "alignment", "aesthetic", "mfu", "throughput"}
_MARKUP = re.compile(r"</?\w+>|\*\*|__|\$")
_EXTRA = "beyond the header"  # key under which csv keeps cells that no column names
_DIVERGED = {"nan", "inf", "+inf", "-inf", "infinity", "diverged", "diverge", "div"}


@dataclass(frozen=True)
class Columns:
    """Which column holds what; rows with the same scale and hyperparameter are seeds, numbered as they come
    where ``seed`` names no column."""

    scale: str
    hp: str
    score: str
    seed: str | None = None


def lower_is_better(score: str) -> bool | None:
    """What a score's name says of its direction; None if it is not a well-known one."""
    words = set(re.findall(r"[a-z]+", score.lower()))
    return True if words & _LOWER else False if words & _HIGHER else None


def verify_table(
    path: str | Path, columns: Columns, *, lower: bool, proxy: float | None = None, limits: Limits | None = None
) -> TransferVerdict:
    """The verdict on a CSV file; ``best`` is in the column's own units, ``proxy`` too.

    Raises:
        UserError: the file is missing or no table, a column is missing, a cell is no number, or nothing is measured.
    """
    rows = _read(Path(path).expanduser(), columns)
    measured = [(line, row) for line, row in rows if row[columns.score]]
    if not measured:
        raise UserError(f"--table: {path} has no row with a {columns.score}; name another --score")
    hps = same_hps(_log2(row, columns.hp, line) for line, row in measured)
    runs: list[RunScore] = []
    scales: dict[float, float] = {}  # as the column has them
    seeds: Counter[tuple[float, float]] = Counter()
    for line, row in measured:
        cell, hp = _log2_or_value(row, columns.scale, line), hps[_log2(row, columns.hp, line)]
        scale = _scale(columns, cell)
        scales[scale] = cell
        seed = seeds[scale, hp] if columns.seed is None else int(_number(row, columns.seed, line))
        seeds[scale, hp] += 1
        diverged = row[columns.score].lower() in _DIVERGED
        runs.append(RunScore(scale, hp, seed, math.nan if diverged else _number(row, columns.score, line)))
    if proxy is not None and _scale(columns, proxy) not in scales:
        shown = ", ".join(f"{scale:.12g}" for scale in sorted(scales.values()))
        raise UserError(f"--proxy: {proxy:g} is not among the values of {columns.scale}: {shown}; choose one of them")
    proxy = None if proxy is None else _scale(columns, proxy)
    name = columns.scale.removeprefix("log2_")
    labels = {"table": str(path), "scale": name, "hp": columns.hp, "score": columns.score}
    verdict = judge(runs, lower_is_better=lower, proxy=proxy, limits=limits, labels=labels)
    values = {_log2_or_value(row, columns.hp, line) for line, row in rows if not _exponents(columns.hp)}
    verdict.best = nearest(values, verdict.best_log2) if values else verdict.best_log2
    return verdict


def _read(path: Path, columns: Columns) -> list[tuple[int, dict[str, str]]]:
    """Line and cells of every row, without the simple markup of papers' tables (``<u>53.90</u>``, ``**53.90**``)."""
    try:
        with io.StringIO(decode_text(path.read_bytes(), f"--table: {path}"), newline="") as file:
            reader = csv.DictReader(file, restkey=_EXTRA, restval=None, skipinitialspace=True)
            reader.fieldnames = names = [(name or "").strip() for name in (reader.fieldnames or [])]
            rows: list[tuple[int, dict[str, Any]]] = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise UserError(f"--table: no file {path}; name a CSV file") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"--table: {path} cannot be read as CSV ({error}); name another file") from error
    _check_columns(path, columns, names)
    if not rows:
        raise UserError(f"--table: {path} has no rows below its header; name another file")
    for line, row in rows:
        if _EXTRA in row or None in row.values():
            cells = len(names) + len(row.get(_EXTRA) or ()) - list(row.values()).count(None)
            raise UserError(f"--table: line {line} of {path} has {cells} cells under {len(names)} columns; complete it")
    return [(line, {name: _MARKUP.sub("", cell).strip() for name, cell in row.items()}) for line, row in rows]


def _check_columns(path: Path, columns: Columns, names: list[str]) -> None:
    """Each requested column once in the header ``names``, and no column for two things. Raises UserError."""
    options = {"--scale": columns.scale, "--hp": columns.hp, "--score": columns.score, "--seed": columns.seed}
    requested = {option: column for option, column in options.items() if column is not None}
    for option, column in requested.items():
        if column not in names:
            remedy = did_you_mean(column, names, f"it has {', '.join(names) or 'none'}")
            raise UserError(f"{option}: {path} has no column {column}; {remedy}")
        if names.count(column) > 1:
            raise UserError(f"{option}: {path} has {names.count(column)} columns {column}; rename all but one")
        if list(requested.values()).count(column) > 1:
            raise UserError(f"{option}: {column} is asked for twice; scale, hp, score and seed are different columns")


def _exponents(column: str) -> bool:
    return column.lower().startswith("log2_")


def _scale(columns: Columns, cell: float) -> float:
    """The scale that a cell of its column stands for."""
    return 2.0**cell if _exponents(columns.scale) else cell


def _number(row: Mapping[str, str], column: str, line: int) -> float:
    value = parse_number(row[column].replace(",", ""))
    if value is None:
        raise UserError(
            f"--table: {column} in line {line} is {row[column]!r}, not a number; correct it or empty the score"
        )
    return float(value)


def _log2_or_value(row: Mapping[str, str], column: str, line: int) -> float:
    """The cell as it is; positive unless the column holds exponents."""
    value = _number(row, column, line)
    if _exponents(column) and abs(value) > 1000:
        raise UserError(f"--table: {column} in line {line} is {value:g}, but 2 to that power is no number; correct it")
    if value <= 0 and not _exponents(column):
        raise UserError(
            f"--table: {column} in line {line} is {value:g}, and only positive values have a log2; if the column holds "
            f"exponents, call it log2_{column}"
        )
    return value


def _log2(row: Mapping[str, str], column: str, line: int) -> float:
    """The cell's log2."""
    value = _log2_or_value(row, column, line)
    return value if _exponents(column) else math.log2(value)
