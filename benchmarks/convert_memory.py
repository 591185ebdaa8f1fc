#!/usr/bin/env python
"""How much memory a conversion takes, as shares of the larger of its two files; every case is a process of its own.

A synthetic MMDiT (Stable Diffusion 3's architecture) of about --megabytes in float32 is written, and converted:

  in     the authors' file (.pt in three precisions, .safetensors), and a sharded folder of diffusers, to megadit
  out    megadit to the authors' file (.safetensors, .pt), to a folder of diffusers, to safetensors
  plain  safetensors to safetensors, and to the torch file of zero_to_fp32

  rss    peak of the resident memory (ru_maxrss) less what was resident before, with torch, megadit and, where it is
         asked for, diffusers imported: pages of mapped files count
  anon   the same of anonymous memory (RssAnon, sampled every 10 ms): what cannot be had back by dropping pages

python benchmarks/convert_memory.py [--megabytes 4000 --folder SCRATCH --case megadit-diffusers …]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

# Name: format and place of IN, format and place of OUT. A case reads what one before it has written.
CASES: dict[str, tuple[str, str, str, str]] = {
    "official-pt-fp32": ("official-mmdit", "float32.pt", "megadit", "run"),
    "megadit-diffusers": ("megadit", "run", "diffusers", "pipeline"),
    "diffusers-megadit": ("diffusers", "sharded", "megadit", "out"),
    "megadit-safetensors": ("megadit", "run", "official-mmdit", "out.safetensors"),
    "megadit-pt": ("megadit", "run", "official-mmdit", "out.pt"),
    "official-pt-fp16": ("official-mmdit", "float16.pt", "megadit", "out"),
    "official-pt-bf16": ("official-mmdit", "bfloat16.pt", "megadit", "out"),
    "official-safetensors": ("official-mmdit", "float32.safetensors", "megadit", "out"),
    "megadit-plain": ("megadit", "run", "safetensors", "plain.safetensors"),
    "plain-safetensors": ("safetensors", "plain.safetensors", "safetensors", "out.safetensors"),
    "plain-torch": ("safetensors", "plain.safetensors", "fp32-state-dict", "out.bin"),
}
_SHARDS = 4  # of the folder of diffusers that is read
_HEAD = 64
_INTERVAL_S = 0.01


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--megabytes", type=int, default=4000, help="of the model in float32")
    p.add_argument("--folder", type=Path, help="for files of about four times the size (default: a temporary one)")
    p.add_argument("--case", action="append", choices=CASES, help="these alone, and what they read")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    p.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return p


def model_of(megabytes: int) -> Any:
    """An SD3-like config of about that size in float32: width = 64 depth, as all published sizes have."""
    from megadit.config import ModelConfig

    depth = max(1, round((megabytes * 2.5e5 / (36 * _HEAD**2)) ** (1 / 3)))
    return ModelConfig(
        family="mmdit",
        width=_HEAD * depth,
        depth=depth,
        heads=depth,
        input_size=32,
        in_channels=16,
        num_classes=0,
        learn_sigma=False,
        qk_norm="rms",
        text={"dim": 512, "max_length": 77, "pooled_dim": 512, "mask": False},  # type: ignore[arg-type]
    )


def write_sources(folder: Path, names: set[str], megabytes: int) -> None:
    """The files of the authors' form, tensor by tensor; random bits of sizes that a model computes with."""
    import torch
    from torch import Tensor

    from megadit.convert import to_official
    from megadit.convert.deferred import deferred
    from megadit.convert.state_dicts import write_one
    from megadit.convert.torch_files.write import save_streaming
    from megadit.models.conversion.key_maps import model_shapes

    model = model_of(megabytes)

    def weight(shape: tuple[int, ...], seed: int) -> Tensor:
        def draw() -> Tensor:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            return values / math.sqrt(max(shape[-1], 2)) if len(shape) > 1 else 1 + 0.1 * values

        return deferred(shape, torch.float32, draw)

    state = {name: weight(shape, seed) for seed, (name, shape) in enumerate(model_shapes(model).items())}
    official = to_official(model, state)
    for name in sorted(names):
        if name.endswith(".safetensors"):
            write_one(folder / name, official)
        else:
            dtype = getattr(torch, name.removesuffix(".pt"))
            save_streaming({key: value.to(dtype) for key, value in official.items()}, folder / name)


def cut(source: Path, target: Path) -> None:
    """The folder of diffusers again, its weights in ``_SHARDS`` shards."""
    from megadit.convert.safetensors_file import SafetensorsFile
    from megadit.convert.state_dicts import write_folder

    name = "diffusion_pytorch_model"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = SafetensorsFile(source / "transformer" / f"{name}.safetensors").tensors()
    size = sum(value.nbytes for value in tensors.values())
    write_folder(target / "transformer", name, tensors, limit=size // _SHARDS)


def child(source_format: str, source: str, target_format: str, target: str) -> None:
    """Convert in this process, and print one JSON object of what it took."""
    from megadit.convert.conversion import convert
    from megadit.models import build_model  # noqa: F401 - imported before memory is looked at
    from megadit.optional import import_diffusers

    if "diffusers" in (source_format, target_format):
        getattr(import_diffusers(), "SD3Transformer2DModel")  # noqa: B009 - imported when it is asked for
    before = _status("VmRSS"), _status("RssAnon")
    peak, done = [before[1]], threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            peak[0] = max(peak[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    hints = {"input_size": 32} if source_format.startswith("official") else {}
    outcome = convert(source_format, target_format, Path(source), Path(target), hints=hints)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before[0]
    size = max(_size(Path(source)), _size(Path(target)))
    difference = None if outcome.difference is None else outcome.difference.maximum
    measured = {"bytes": size, "rss": rss / size, "anon": (peak[0] - before[1]) / size, "seconds": seconds}
    print(json.dumps({**measured, "rss_bytes": rss, "difference": difference}))


def _status(key: str) -> int:
    """Bytes of a key of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*.*"))


def measure(folder: Path, megabytes: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each case took; what it wrote and no later case reads is removed."""
    wanted = [name for name in CASES if name in _with_needs(names)]
    results = {}
    for number, name in enumerate(wanted):
        source_format, source, target_format, target = CASES[name]
        if source == "sharded":
            cut(folder / "pipeline", folder / source)
        elif source.split(".")[0] in ("float32", "float16", "bfloat16") and not (folder / source).exists():
            write_sources(folder, {source}, megabytes)
        given = [source_format, str(folder / source), target_format, str(folder / target)]
        command = [sys.executable, __file__, "--child", *given]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
        results[name] = json.loads(finished.stdout.splitlines()[-1])
        print(_row(name, results[name]), file=sys.stderr, flush=True)
        later = {CASES[each][1] for each in wanted[number + 1 :]}
        later |= {"pipeline"} if "sharded" in later else set()
        for path in (folder / source, folder / target):
            if path.name not in later:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {name: results[name] for name in names}


def _row(name: str, measured: dict[str, Any]) -> str:
    source_format, source, target_format, target = CASES[name]
    conversion = f"{source_format} `{source}` → {target_format} `{target}`"
    size = measured["bytes"] / 1e9
    return f"| {conversion} | {size:.2f} | {measured['rss']:.3f} | {measured['anon']:.3f} | {measured['seconds']:.0f} |"


def _with_needs(names: Sequence[str]) -> set[str]:
    """The cases and those that write what they read."""
    writers = {target: name for name, (_, _, _, target) in reversed(CASES.items())} | {"sharded": "megadit-diffusers"}
    cases: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        cases.add(name)
        needed = writers.get(CASES[name][1])
        left += [needed] if needed and needed not in cases else []
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    args = parser().parse_args(argv)
    if args.child:
        child(*args.child)
        return 0
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder), args.megabytes, args.case or list(CASES))
    if args.json:
        print(json.dumps(results))
        return 0
    print("| conversion | larger file, GB | rss / file | anon / file | s |\n|---|---|---|---|---|")
    for name, measured in results.items():
        print(_row(name, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
