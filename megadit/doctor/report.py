"""Results of checks, the report made of them, and how to silence what checks import."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """The result of one check. ``remedy``: what helps where ``state`` is not ok; ``needed``: training requires it."""

    section: str
    name: str
    state: State
    detail: str
    remedy: str = ""
    needed: bool = False


@dataclass(frozen=True)
class MachineReport:
    """All checks of this machine."""

    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether training is possible: every needed check is ok."""
        return all(check.state == "ok" for check in self.checks if check.needed)

    @property
    def verdict(self) -> str:
        """One line: ready or not, and whether there is a GPU."""
        gpu = next((check for check in self.checks if check.name == "cuda"), None)
        has_gpu = gpu is not None and gpu.state == "ok"
        reason = gpu.detail if gpu is not None else "not looked for"
        gpu_note = f"GPU: {reason}" if has_gpu else f"GPU: none ({reason})"
        if not self.ready:
            causes = ", ".join(check.name for check in self.checks if check.needed and check.state != "ok")
            return f"not ready for training: {causes}; {gpu_note}"
        return f"ready for {'GPU' if has_gpu else 'CPU'} training; {gpu_note}"

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {"ready": self.ready, "verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


def format_report(report: MachineReport) -> str:
    """An aligned table, section by section; a remedy stands below its check.

    Needs no ``megadit.tables``: the command runs before tabulate is installed.
    """
    width = max(len(check.name) for check in report.checks)
    lines: list[str] = []
    section = ""
    for check in report.checks:
        if check.section != section:
            section = check.section
            lines += ["", section]
        lines.append(f"  {check.name:<{width}}  {check.state:<7}  {check.detail}")
        if check.remedy and check.state != "ok":
            lines.append(f"  {'':<{width}}  {'':<7}  -> {check.remedy}")
    return "\n".join([*lines[1:], "", report.verdict])


def failure_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters; for a failed program the last line of its stderr."""
    stderr = getattr(error, "stderr", None)
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or str(error)
    lines = text.strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1] if stderr else lines[0]}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what imports and probes print, on the file descriptors too, since C++ code writes there."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            for stream, _ in saved:
                os.dup2(nowhere.fileno(), stream)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
