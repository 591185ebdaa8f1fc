"""Scores of a run, read from its metrics after it ended.

The functions here take the rows of ``metrics.jsonl``. A row's loss is the mean over the steps since the row before it,
so a mean over the last k steps weighs each row by the number of its steps among them. Losses are those of the objective
alone: with REPA's part, trials of different ``objective.repa_weight`` could not be compared.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError
from megadit.files.json_text import JsonError, parse_json
from megadit.parallel.environment import without_rank_variables
from megadit.train.run_dir import is_number

if TYPE_CHECKING:
    from megadit.search.study.spec import ScoreSpec

Row = Mapping[str, Any]
COMMAND_TIMEOUT_S = 24 * 3600.0
_OUTPUT_TAIL = 400  # characters of a failed command's output in the error


def train_loss(rows: Sequence[Row], at: int, last: int = 1) -> float | None:
    """Mean training loss over the ``last`` steps up to and including step ``at``.

    None when the run did not log step ``at`` or a loss among these is not finite. A row that reaches back beyond the
    window counts for its steps inside it.
    """
    total, steps, previous, reached = 0.0, 0, 0, False
    for row in rows:
        step, loss = row["step"], _objective_loss(row)
        if step > at:
            break
        inside = step - max(previous, at - last)
        if inside > 0:
            if loss is None or not math.isfinite(loss):
                return None
            total += inside * loss
            steps += inside
        previous, reached = step, step == at
    return total / steps if reached and steps else None


def _objective_loss(row: Row) -> float | None:
    """A row's loss without REPA's part; None where it was not finite."""
    if row.get("loss_repa") is None:
        loss: float | None = row.get("loss")
        return loss
    parts = [value for key, value in row.items() if key.startswith("loss_") and key not in ("loss_repa", "loss_bins")]
    return None if row.get("loss") is None or None in parts else float(sum(parts))


def val_loss(rows: Sequence[Row], at: int) -> float | None:
    """The validation loss measured after step ``at``; None when it was not, or is not finite."""
    loss = next((row.get("val_loss") for row in rows if row["step"] == at), None)
    return loss if loss is not None and math.isfinite(loss) else None


def divergence(rows: Sequence[Row], at: int, above: float | None, last: int = 1) -> str | None:
    """Why the run counts as diverged at step ``at``; None when it does not.

    Its training loss over the ``last`` steps is not finite (or was never reached), or is more than ``above`` times the
    first logged loss; ``above`` None: only the former.
    """
    loss = train_loss(rows, at, last)
    if loss is None:
        return f"no finite training loss at step {at}"
    first = _objective_loss(rows[0])
    if above is not None and first is not None and loss > above * first:
        return f"the training loss at step {at} is {loss:.4g}, more than {above:g} times the first, {first:.4g}"
    return None


def metric_scores(rows: Sequence[Row], at: int, specs: Sequence[ScoreSpec]) -> dict[str, float | None]:
    """The scores that the metrics hold for step ``at``, by name; None for those of kind command."""
    scores: dict[str, float | None] = dict.fromkeys(spec.name for spec in specs)
    scores |= {spec.name: train_loss(rows, at, spec.last) for spec in specs if spec.kind == "train_loss"}
    return scores | {spec.name: val_loss(rows, at) for spec in specs if spec.kind == "val_loss"}


def command_score(spec: ScoreSpec, run_dir: Path, timeout_s: float = COMMAND_TIMEOUT_S) -> float | None:
    """Run the command of a score in its own process group and read ``spec.key`` of the JSON object on its stdout.

    ``{run_dir}`` in its words becomes the run directory. None for a value that is not finite.

    Raises:
        UserError: it cannot be started, fails, takes longer than ``timeout_s`` seconds, or prints no such number.
    """
    words = [word.replace("{run_dir}", str(run_dir)) for word in spec.command or ()]
    label = f"scores.{spec.name}: '{' '.join(words)}'"
    # The command is one process: it must not take itself for a rank of the worker's group.
    env = without_rank_variables(os.environ)
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
            start_new_session=True, encoding="utf-8", errors="replace")  # fmt: skip
    except OSError as error:
        raise UserError(f"{label} cannot be started ({error.strerror or error}); correct the command") from error
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise UserError(f"{label} took longer than {timeout_s:g} s; make it quicker") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        raise UserError(f"{label} ended with exit code {process.returncode}: {(err or out).strip()[-_OUTPUT_TAIL:]}")
    value = _value(out, spec.key or spec.name)
    if value is None:
        raise UserError(f"{label} printed no JSON object with a number '{spec.key or spec.name}'; correct key")
    return value if math.isfinite(value) else None


def _value(text: str, key: str) -> float | None:
    """The number under ``key`` of the JSON object that is the whole of ``text`` or its last line."""
    for part in (text, text.strip().rpartition("\n")[2]):
        try:
            values = parse_json(part)
        except JsonError:
            continue
        if isinstance(values, dict) and is_number(values.get(key)):
            return float(values[key])
    return None
