"""What the benchmarks share: arms that take turns, and the run that ``launch/pretrain.py`` would assemble."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def medians(names: Iterable[str], warmup: int, rounds: int, once: Callable[[str], float]) -> dict[str, float]:
    """Median over the counted ``rounds`` of what ``once(name)`` measures, by name.

    The arms take turns, so that a drifting machine slows all alike, and the order flips each round.
    """
    arms = list(names)
    values: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        for name in arms if turn % 2 else reversed(arms):
            value = once(name)
            if turn >= warmup:
                values[name].append(value)
    return {name: statistics.median(counted) for name, counted in values.items()}


def median_seconds(arms: Mapping[str, Callable[[], Any]], warmup: int, rounds: int) -> dict[str, float]:
    """``medians`` of the seconds that each arm takes by the wall clock."""

    def once(name: str) -> float:
        begin = time.perf_counter()
        arms[name]()
        return time.perf_counter() - begin

    return medians(arms, warmup, rounds, once)


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
