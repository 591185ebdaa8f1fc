"""What a check found, what all of them say together, and how checks keep quiet meanwhile."""

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
    """One line of the report. ``needed``: training is impossible without it."""

    section: str
    name: str
    state: State
    detail: str
    remedy: str = ""
    needed: bool = False


@dataclass(frozen=True)
class MachineReport:
    """All checks, and what follows from them."""

    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether training is possible here."""
        return all(check.state == "ok" for check in self.checks if check.needed)

    @property
    def verdict(self) -> str:
        """One line: ready or not, and the GPU's part in it."""
        gpu = next((check for check in self.checks if check.name == "cuda"), None)
        has_gpu = gpu is not None and gpu.state == "ok"
        reason = gpu.detail if gpu is not None else "not looked for"
        told = f"GPU: {reason}" if has_gpu else f"GPU: none ({reason})"
        if not self.ready:
            causes = ", ".join(check.name for check in self.checks if check.needed and check.state != "ok")
            return f"not ready for training: {causes}; {told}"
        return f"ready for {'GPU' if has_gpu else 'CPU'} training; {told}"

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"ready": self.ready, "verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


def format_report(report: MachineReport) -> str:
    """An aligned table, section by section; a remedy stands below the line that needs it."""
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


def one_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters; of a failed program, the end of what it said."""
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or str(error)
    lines = text.strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1] if said else lines[0]}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what imports and probes print (both descriptors: C++ code writes there too), so that the table stays one."""
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
