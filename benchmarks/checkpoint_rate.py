#!/usr/bin/env python
"""Rate of saving and loading a checkpoint's tensors against torch.save and torch.load of the same bytes, in one run.

Weights and two moments of a model of --parameters, in fragments as a single rank writes them. Both sides write to the
same folder and flush the file to the disk before the clock stops; loading reads what the page cache holds, so that the
work and not the disk is compared, and ours also compares every checksum. The arms take turns and the order flips each
round. The peak of memory is how far the resident memory rises above the tensors themselves.

python benchmarks/checkpoint_rate.py [--parameters 32000000 --rounds 7 --folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parameters", type=int, default=32_000_000, metavar="N", help="elements; default 32 million")
    p.add_argument("--tensor", type=int, default=2_000_000, metavar="N", help="elements of one parameter; default 2e6")
    p.add_argument("--rounds", type=int, default=7, help="counted rounds of each arm")
    p.add_argument("--folder", metavar="DIR", help="where to write; default a temporary folder")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return p


def arms(folder: Path, elements: int, size: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """The four things to time, by name, and the bytes that each moves."""
    import torch

    from megadit.checkpoint.format import StoredFragment
    from megadit.checkpoint.fragment_files import write_fragments
    from megadit.checkpoint.fragment_reader import FragmentReader

    names = [f"blocks.{i}.weight" for i in range(max(1, elements // size))]
    tensors = {f"{kind}/{name}": torch.randn(size) for name in names for kind in KINDS}
    fragments = [StoredFragment(kind, name, 0, size, "ours") for name in names for kind in KINDS]
    targets = {key: torch.empty(size) for key in tensors}
    index: list[Any] = []

    def save() -> None:
        index[:] = write_fragments(
            folder / "ours", [(fragment, tensors[f"{fragment.kind}/{fragment.name}"]) for fragment in fragments]
        )

    def load() -> None:
        record, written = index
        with FragmentReader(folder, {key: [size] for key in names}, written, {"ours": record}) as reader:
            for fragment in fragments:
                reader.read_into(targets[f"{fragment.kind}/{fragment.name}"], fragment.kind, fragment.name)

    def torch_save() -> None:
        with open(folder / "theirs", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load() -> None:
        loaded = torch.load(folder / "theirs", weights_only=True)
        for key, target in targets.items():
            target.copy_(loaded[key])

    made = {"save": save, "torch.save": torch_save, "load": load, "torch.load": torch_load}
    return made, sum(t.numel() for t in tensors.values()) * 4


def memory_mb(key: str) -> float:
    """A line of this process's status: VmRSS now, VmHWM the peak since the last reset."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) / 1024


def rise_mb(action: Callable[[], Any]) -> float:
    """How far the resident memory rises while ``action`` runs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = memory_mb("VmRSS")
    action()
    return memory_mb("VmHWM") - before


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from benchmarks.arms import median_seconds

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        made, size = arms(Path(folder), args.parameters, args.tensor)
        for action in made.values():  # once uncounted, which also leaves files to load
            action()
        peaks = {name: round(rise_mb(action), 1) for name, action in made.items()}
        medians = median_seconds(made, 0, args.rounds)
    result = {
        "megabytes": round(size / 1e6, 1),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "mb_per_s": {name: round(size / 1e6 / value, 1) for name, value in medians.items()},
        "save_over_torch": round(medians["save"] / medians["torch.save"], 3),
        "load_over_torch": round(medians["load"] / medians["torch.load"], 3),
        "rise_mb": peaks,
        "fragment_mb": round(args.tensor * 4 / 1e6, 1),
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['megabytes']} MB in fragments of {result['fragment_mb']} MB, median of {args.rounds} rounds")
    for name, value in medians.items():
        print(f"  {name:11s} {value:8.3f} s  {size / 1e6 / value:8.1f} MB/s   memory + {peaks[name]:.1f} MB")
    print(f"save / torch.save  {result['save_over_torch']}   (aim ≤ 1.3)")
    print(f"load / torch.load  {result['load_over_torch']}   (aim ≤ 1.3)")
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
