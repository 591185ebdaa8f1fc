"""Checks of this machine: versions, backends and a real training step, each with the reason where it does not work.

Imports nothing but the standard library at first, so that it also runs where torch or megadit's other requirements are
missing or broken.
"""

from __future__ import annotations

from megadit.doctor.machine import check_backends, check_machine
from megadit.doctor.report import Check, MachineReport, format_report
from megadit.doctor.software import check_software
from megadit.doctor.training import check_distributed, check_step, start_step

__all__ = ["Check", "MachineReport", "examine", "format_report"]


def examine() -> MachineReport:
    """Run every check; takes about ten seconds, most of them for importing each package and DeepSpeed's step."""
    step = start_step()  # beside the other checks, which mostly wait for the disk
    checks = [*check_machine(), *check_software(), *check_backends(), *check_distributed()]
    return MachineReport((*checks, check_step(step)))
