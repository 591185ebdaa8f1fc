#!/usr/bin/env python
"""Everything that needs a GPU, in under ten minutes on one: the tests, then the benchmarks, into one file and one page.

Runs `pytest -m gpu`, kernels.py, blocks.py, mup_overhead.py and adamw.py one after another, each with a limit of time;
what a machine lacks is skipped and listed with what it needs. Writes all numbers to one JSON file, and a page with the
machine's ceilings, the results and the aims beside them. The exit code is 1 where a test or a benchmark failed, not
where an aim was missed.

make gpu                                             # benchmarks/gpu_results.json and docs/gpu.md
python benchmarks/gpu.py --dry_run --results FILE --page FILE    # on the CPU: every line, no measurement
python benchmarks/gpu.py --only_page --page docs/gpu.md          # the page of the results that there are
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

# Seconds that a part may take, of 600 in all: starting and compiling included.
LIMITS = {"tests": 165, "kernels": 145, "blocks": 190, "mup_overhead": 45, "adamw": 45}
RESULTS = "benchmarks/gpu_results.json"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=ROOT / RESULTS, help="all numbers (default: %(default)s)")
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md", help="the page (default: %(default)s)")
    p.add_argument("--dry_run", action="store_true", help="on the CPU, through Triton's interpreter, at tiny sizes")
    p.add_argument("--only_page", action="store_true", help="write the page of the results that there are, run nothing")
    return p


def files_with_gpu_tests() -> list[str]:
    """Those alone, so that a file which imports what this machine lacks is an error only where it matters."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(dry_run: bool) -> dict[str, Any]:
    """Run the GPU tests; of a dry run collect them. Their numbers, what failed, and what was skipped and why."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped_all": "the package pytest (and pytest-timeout)"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rsfE", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "addopts=--import-mode=importlib", "-o", "timeout="]
    command += ["--collect-only"] if dry_run else ["--continue-on-collection-errors"]
    command += files_with_gpu_tests()
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT, timeout=LIMITS["tests"]
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, (error.stdout or b"").decode(errors="replace")
    lines = output.splitlines() or [""]
    counted = re.findall(r"(\d+)(?:/\d+ tests)? (passed|failed|skipped|errors?|collected)", lines[-1])
    counts = {word: int(number) for number, word in counted}
    return {
        "code": code,
        "seconds": round(time.monotonic() - begin, 1),
        "counts": counts,
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "tail": lines[-5:],
    }


def run_benchmark(name: str, dry_run: bool, folder: Path) -> dict[str, Any]:
    """The document that the benchmark wrote; ``error`` with its last lines where it failed."""
    out = folder / f"{name}.json"
    seconds = LIMITS[name]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(out)]
    command += ["--seconds", str(max(seconds - 40, 10)), *(["--dry_run"] if dry_run else [])]
    print(f"{name}: at most {seconds} s", flush=True)
    try:
        limit = 600 if dry_run else seconds
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT, timeout=limit)
        print(done.stdout, flush=True)
        if done.returncode == 0:
            document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return document
        reason = done.stderr.strip()
    except subprocess.TimeoutExpired:
        reason = f"not finished after {seconds} s"
    print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
    return {"error": reason.splitlines()[-10:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the results and the page."""
    args = parser().parse_args(argv)
    from benchmarks.gpu_page import BENCHMARKS, page
    from megadit.errors import UserError

    if args.only_page:
        stored = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else None
        args.page.write_text(page(stored), encoding="utf-8")
        return 0
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise UserError(
            "make gpu: there is no CUDA device; `python benchmarks/gpu.py --dry_run` runs its lines on the CPU"
        )
    from benchmarks.gpu_timing import DRY_RUN_NOTE, machine

    begin = time.monotonic()
    results: dict[str, Any] = {"dry_run": args.dry_run, "note": DRY_RUN_NOTE if args.dry_run else None}
    results["machine"] = machine()
    results["tests"] = run_tests(args.dry_run)
    print("\n".join(results["tests"].get("tail", [])), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            results[name] = run_benchmark(name, args.dry_run, Path(folder))
    results["ceilings"] = results["kernels"].get("ceilings") or results["blocks"].get("ceilings")
    results["seconds"] = round(time.monotonic() - begin, 1)
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.page.write_text(page(results), encoding="utf-8")
    print(f"{args.results} and {args.page} written after {results['seconds']:.0f} s")
    bad_tests = results["tests"].get("code", 0) not in (0, 5)
    return int(bad_tests or any("error" in results[name] for name in BENCHMARKS))


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
