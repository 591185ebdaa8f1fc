"""``launch/pretrain.py`` in which one rank comes to grief: FAULT=RANK:STEP:raise|kill|stop|config."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels")]

from megadit.cli.main import run  # noqa: E402


class PlantedError(Exception):
    """The fault."""


def plant(rank: int, step: int, kind: str) -> None:
    """On that rank do that when it runs its block number ``step``; ``config``: give it another learning rate."""
    from megadit.models import stages

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != str(rank):
        return
    if kind == "config":
        sys.argv.append("optim.lr=0.123")
        return
    plain, calls = stages.run_block, []

    def run_block(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            if kind == "raise":
                raise PlantedError(f"planted on rank {rank}")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(*args)

    stages.run_block = run_block  # type: ignore[assignment]


def main() -> None:
    """Plant the fault and run."""
    rank, call, kind = os.environ["FAULT"].split(":")
    plant(int(rank), int(call), kind)
    run("pretrain")


if __name__ == "__main__":
    main()
