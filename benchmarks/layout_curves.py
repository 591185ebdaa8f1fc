#!/usr/bin/env python
"""One run on every kind of layout, by the real command: its loss curves, and how far each is from one process.

OMP_NUM_THREADS=1 python benchmarks/layout_curves.py --out layouts

One of the runs only adds up in another order, in one process, as pipeline 4 does: as far as that are layouts from each
other. The last changes its layout at every resume. Writes layouts.png and layouts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALONE = "one process"
RELAY = "another layout every quarter"
# name -> ranks and keys
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    ALONE: (1, ()),
    "tensor 2": (2, ("parallel.tensor=2",)),
    "tensor 2 × data 2, sequence, ZeRO 3": (
        4,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=3"),
    ),
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "tensor 2 × pipeline 2 × data 2": (8, ("parallel.tensor=2", "parallel.pipeline=2")),
    "one process, micro batches of 2": (1, ("train.micro_batch=2",)),
}
STATIONS = ("tensor 2", "pipeline 4", ALONE, "tensor 2 × data 2, sequence, ZeRO 3")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all layouts one after the other and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/digits.yaml", help="default: digits")
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 4; default 200")
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"), help="default runs/layouts; runs stay in it")
    options = parser.parse_args(argv)
    losses = {}
    for number, (name, (ranks, keys)) in enumerate(LAYOUTS.items()):
        losses[name] = _train(options, options.out / f"run-{number}", ranks, keys, options.steps)
        print(f"{name}: {_gap_text(losses, name)}", flush=True)
    for station, name in enumerate(STATIONS, start=1):
        ranks, keys = LAYOUTS[name]
        until = station * options.steps // len(STATIONS)
        losses[RELAY] = _train(options, options.out / "relay", ranks, keys, until)
    print(f"{RELAY}: {_gap_text(losses, RELAY)}")
    (options.out / "layouts.json").write_text(json.dumps(losses, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _draw(losses, options.out / "layouts.png")
    print(f"wrote {options.out / 'layouts.png'}")
    return 0


def _train(options: argparse.Namespace, folder: Path, ranks: int, keys: tuple[str, ...], until: int) -> list[float]:
    """Losses of all steps up to ``until``; a run that is there already goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["launch/pretrain.py", "--config", options.config, "--run_dir", str(folder.resolve())]
    command += [f"train.steps={until}", "train.log_every=1", "train.tensorboard=false", *keys]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row][:until]


def _gaps(losses: dict[str, list[float]], name: str) -> list[float]:
    return [abs(loss - reference) / reference for loss, reference in zip(losses[name], losses[ALONE], strict=True)]


def _gap_text(losses: dict[str, list[float]], name: str) -> str:
    gaps = _gaps(losses, name)
    return f"largest relative difference of a loss {max(gaps[:10]):.1e} in 10 steps, {max(gaps):.1e} in {len(gaps)}"


def _draw(losses: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    for number, name in enumerate(losses):
        steps = range(1, len(losses[name]) + 1)
        style = {"color": f"C{number}", "linewidth": 1.2 + 1.1 * (len(losses) - 1 - number), "label": name}
        axes[0].plot(steps, losses[name], **style)
        if name != ALONE:
            floor = [max(gap, 1e-9) for gap in _gaps(losses, name)]
            axes[1].semilogy(steps, floor, color=f"C{number}", linewidth=0.8 + 0.6 * (len(losses) - 1 - number))
    axes[0].set_ylabel("loss")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].set_ylabel("relative difference from one process")
    axes[1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    sys.exit(main())
