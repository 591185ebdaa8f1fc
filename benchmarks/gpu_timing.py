"""What the GPU benchmarks share: arms timed by CUDA events, the machine's ceilings, deadlines, the file of results.

On a CPU (``--dry_run``) the same lines run at tiny sizes by the wall clock: their numbers mean nothing, and say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.arms import medians

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DRY_RUN_NOTE = "dry run, not a measurement"
# Zeroed before each timed call: it leaves nothing in the L2 cache (50 MB on an H200), and takes half a millisecond, in
# which Python queues the call, so that the events time the GPU and not the interpreter.
_FLUSH_BYTES = 2 << 30


@dataclass(frozen=True)
class Arm:
    """``run`` is timed; ``prepare`` runs before it, untimed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


class Stopwatch:
    """Medians of arms that take turns, in ms, on ``device`` (cuda or cpu)."""

    def __init__(self, device: str, *, warmup: int, rounds: int) -> None:
        self.device, self.warmup, self.rounds = device, warmup, rounds
        self._flush: torch.Tensor | None = None

    def medians(self, arms: Mapping[str, Arm], *, cold: bool = False) -> dict[str, float]:
        """Median of each arm over the counted rounds, see ``arms.medians``; ``cold``: nothing is in the L2 cache."""

        def once(name: str) -> float:
            arms[name].prepare()
            return self._once(arms[name].run, cold)

        return medians(arms, self.warmup, self.rounds, once)

    def _once(self, run: Callable[[], Any], cold: bool) -> float:
        import torch

        if self.device != "cuda":
            begin = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            if self._flush is None:
                self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
            self._flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def peak_gb(self, run: Callable[[], Any]) -> float:
        """GB (1e9 bytes) that are allocated at the highest point of ``run``, weights and inputs included."""
        import torch

        if self.device != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


@dataclass
class Deadline:
    """``left`` says whether another case may begin; ``skipped`` holds what could not, and what lacks a package."""

    seconds: float
    skipped: list[dict[str, str]] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def left(self, what: str) -> bool:
        """False, with ``what`` noted, once the time is over."""
        if time.monotonic() - self.begin < self.seconds:
            return True
        self.skip(what, f"time: {self.seconds:g} s were over; give more by --seconds")
        return False

    def skip(self, what: str, needs: str) -> None:
        """Note and print it: nothing is left out in silence."""
        self.skipped.append({"what": what, "needs": needs})
        print(f"SKIPPED {what}: {needs}", flush=True)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Products of float32 in TF32 or not, inside; what was set before afterwards."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _copy_gb_s(watch: Stopwatch, count: int) -> float:
    import torch

    source = torch.zeros(count, dtype=torch.float32, device=watch.device)
    target = torch.empty_like(source)
    return 2 * count * 4 / watch.medians({"copy": Arm(lambda: target.copy_(source))})["copy"] / 1e6


def machine_ceilings(watch: Stopwatch, deadline: Deadline, *, dry_run: bool) -> dict[str, float | None]:
    """Measured here: GB/s of a copy of 2 GB, read and written, dense TFLOP/s of square products in each precision."""
    import torch

    device, size = watch.device, 64 if dry_run else 8192
    ceilings: dict[str, float | None] = {"copy_gb_s": _copy_gb_s(watch, 1 << (12 if dry_run else 29))}
    operands = torch.randn(size, size, device=device)
    halves = operands.bfloat16()
    arms = {"bf16": Arm(lambda: halves @ halves), "tf32": Arm(lambda: operands @ operands)}
    try:
        eights = operands.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)

        def fp8() -> Any:
            return torch._scaled_mm(eights, eights.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        fp8()
        arms["fp8"] = Arm(fp8)
    except (RuntimeError, ValueError) as error:
        deadline.skip("fp8 ceiling", f"a GPU with FP8 units, sm_89 or later ({str(error).splitlines()[0][:80]})")
    with tf32(True):
        times = watch.medians(arms)
    for name in ("bf16", "tf32", "fp8"):
        ceilings[f"{name}_tflop_s"] = 2 * size**3 / times[name] / 1e9 if name in times else None
    return ceilings


def common_parser(description: str | None, seconds: int) -> argparse.ArgumentParser:
    """The options that every GPU benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=20, help="counted turns of each arm (default: %(default)s)")
    p.add_argument("--warmup", type=int, default=5, help="turns of each arm before them (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=seconds, help="no case begins later (default: %(default)s)")
    p.add_argument("--dry_run", action="store_true", help="tiny sizes on the CPU; the numbers are no measurement")
    p.add_argument("--out", type=Path, help="write the results to this JSON file")
    return p


def start(args: argparse.Namespace) -> tuple[Stopwatch, Deadline]:
    """The stopwatch on the device that ``args`` ask for.

    Raises UserError where there is no GPU and no dry run is asked for.
    """
    import os

    from megadit.errors import UserError

    if args.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
        return Stopwatch("cpu", warmup=0, rounds=1), Deadline(args.seconds)
    import torch

    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device and finds none; --dry_run runs its lines on the CPU")
    return Stopwatch("cuda", warmup=args.warmup, rounds=args.rounds), Deadline(args.seconds)


def machine() -> dict[str, Any]:
    """The GPU, the versions and the date."""
    import platform

    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "date": datetime.date.today().isoformat(),
    }


def finish(args: argparse.Namespace, benchmark: str, result: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
    """The benchmark's results as they stand in the file, written to ``--out`` where that is given."""
    document = {"benchmark": benchmark, "dry_run": args.dry_run, "note": DRY_RUN_NOTE if args.dry_run else None}
    document |= {"machine": machine(), **result, "skipped": deadline.skipped}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
