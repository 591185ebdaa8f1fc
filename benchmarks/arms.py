"""What the benchmarks share: arms that take turns, and the run that ``launch/pretrain.py`` would assemble."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def median_seconds(arms: Mapping[str, Callable[[], Any]], warmup: int, rounds: int) -> dict[str, float]:
    """Median seconds of each arm over the counted ``rounds``.

    The arms take turns, so that a drifting machine slows all alike, and the order flips each round.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        for name in list(arms) if turn % 2 else list(reversed(arms)):
            begin = time.perf_counter()
            arms[name]()
            if turn >= warmup:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def assemble_run(overrides: Sequence[str], folder: str) -> tuple[Any, Any]:
    """The emoji quickstart with ``overrides`` as ``launch/pretrain.py`` assembles it in ``folder``, and its config."""
    from megadit.config import load
    from megadit.parallel import prepare_environment, start_processes
    from megadit.train.prepare import StartPoint, check_job
    from megadit.train.run import build_run
    from megadit.train.run_dir import RunDirectory

    prepare_environment()
    job = check_job(load("configs/quickstart/emoji.yaml", list(overrides)), None, Path(folder), "never")
    directory = RunDirectory(Path(folder))
    directory.create()
    return build_run(job, start_processes(), directory, 10**6, StartPoint()), job.config
