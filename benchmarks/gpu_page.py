"""The page of what `make gpu` measured: the machine's ceilings, the aims, and every result; or that there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]

COMMAND = "make gpu"
BENCHMARKS = ("kernels", "blocks", "mup_overhead", "adamw")
HEAD = """# Measured on a GPU

`{command}` runs every test that needs a GPU and the benchmarks below on one NVIDIA GPU in under ten minutes, and
writes this page and all numbers as `gpu_results.json` in `benchmarks/`.
"""
NEEDS = """
## What it needs

Python 3.11 or later with torch 2.11 to 2.13 built for CUDA, the Triton of that torch, numpy, pydantic, PyYAML and
tabulate. What else is missing is skipped and listed: `diffusers` for the comparison with its class, `pytest` for the
tests, what a test imports (`deepspeed` for those of the engine), a GPU with FP8 units (sm_89 or later) for FP8.
Without a GPU `python benchmarks/gpu.py --dry_run` runs the same lines on the CPU.

| part | command | what it measures |
|---|---|---|
| tests | `python -m pytest -m gpu` | every fused operation against float64, the same bits twice, memory |
| operations | `python benchmarks/kernels.py` | GB/s, share of the copy bandwidth, against eager and compiled torch |
| blocks and models | `python benchmarks/blocks.py` | TFLOP/s, MFU, memory; images/s of DiT-XL/2 against diffusers |
| muP | `python benchmarks/mup_overhead.py` | a step under muP against the same shapes under SP |
| optimizer | `python benchmarks/adamw.py` | the fused update of a shard against torch's AdamW in DeepSpeed's passes |
"""


@dataclass(frozen=True)
class Aim:
    """``value`` of the results (None: not measured) should be at least, or with ``most`` at most, ``bound``."""

    text: str
    value: Callable[[dict[str, Any]], float | None]
    bound: float
    most: bool = False

    def row(self, results: dict[str, Any] | None) -> list[str]:
        """The aim, what was measured, and whether it is reached."""
        value = None if results is None else self.value(results)
        relation = f"{'≤' if self.most else '≥'} {self.bound:g}"
        if value is None:
            return [self.text, relation, "", "not yet measured on a GPU" if results is None else "not measured"]
        if results is not None and results["dry_run"]:
            return [self.text, relation, f"{value:.3f}", "dry run"]
        reached = value <= self.bound if self.most else value >= self.bound
        return [self.text, relation, f"{value:.3f}", "reached" if reached else "not reached"]


def _least(direction: str | None, key: str) -> Callable[[dict[str, Any]], float | None]:
    def value(results: dict[str, Any]) -> float | None:
        rows = results["kernels"].get("rows", [])
        return min((row[key] for row in rows if direction in (None, row["pass"])), default=None)

    return value


def _ratio(part: str, key: str, arms: Sequence[str], others: Sequence[str]) -> Callable[[dict[str, Any]], float | None]:
    """Of the best of ``arms``, over the best of ``others`` where there are some."""

    def value(results: dict[str, Any]) -> float | None:
        rows = {row["arm"]: row for row in results["blocks"].get("rows", []) if row["part"] == part}
        best, rival = (
            max((rows[arm][key] for arm in which if arm in rows and rows[arm][key] is not None), default=None)
            for which in (arms, others)
        )
        if best is None or (others and rival is None):
            return None
        return best / rival if others else best

    return value


_OURS = ("fused", "fused compiled")
_FP8 = ("fp8", "fp8 compiled")
AIMS = (
    Aim("worst operation, forward: share of the copy bandwidth", _least("forward", "share_of_copy"), 0.85),
    Aim("worst operation, backward: share of the copy bandwidth", _least("backward", "share_of_copy"), 0.75),
    Aim("worst operation: time of torch.compile over ours", _least(None, "compiled_over_fused"), 1.0),
    Aim(
        "DiT-XL/2 step, images/s over diffusers (SDPA, bf16)",
        _ratio("dit_step", "images_s", _OURS, ("diffusers",)),
        1.3,
    ),
    Aim("the same over diffusers compiled", _ratio("dit_step", "images_s", _OURS, ("diffusers compiled",)), 1.0),
    Aim(
        "the same over the official way, fp32 and TF32",
        _ratio("dit_step", "images_s", _OURS, ("official way, fp32 and TF32",)),
        2.0,
    ),
    Aim("MMDiT-18B block: MFU in bf16", _ratio("mmdit_block", "mfu", _OURS, ()), 0.6),
    Aim("the same block in FP8 over bf16, images/s", _ratio("mmdit_block", "images_s", _FP8, _OURS), 1.25),
    Aim("step under muP over SP", lambda results: results["mup_overhead"].get("mup_over_sp"), 1.005, most=True),
)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of markdown."""
    head = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *map(list, rows)))


def page(results: dict[str, Any] | None) -> str:
    """The whole page; ``None``: nothing was measured yet."""
    aims = "## Aims\n\n" + table(("aim", "bound", "measured", ""), (aim.row(results) for aim in AIMS))
    if results is None:
        status = f"\n**Not yet measured on a GPU.** The command is ready: `{COMMAND}`.\n"
        return HEAD.format(command=COMMAND) + status + f"\n{aims}\n" + NEEDS
    parts = [_machine(results), aims, *_tables(results), _left_out(results)]
    return HEAD.format(command=COMMAND) + "\n" + "\n\n".join(part for part in parts if part) + "\n" + NEEDS


def _machine(results: dict[str, Any]) -> str:
    machine, ceilings = results["machine"], results["ceilings"] or {}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton") if machine[name])
    warning = f"**{results['note']}**\n\n" if results["note"] else ""
    lines = [f"{warning}{machine['gpu'] or 'CPU'}, {versions}, {machine['date']}, {results['seconds']:.0f} s in all."]
    names = {
        "copy_gb_s": "copy, GB/s",
        "bf16_tflop_s": "bf16 product, TFLOP/s",
        "tf32_tflop_s": "TF32 product, TFLOP/s",
        "fp8_tflop_s": "FP8 product, TFLOP/s",
    }
    measured = [
        [text, "not measured" if ceilings.get(key) is None else f"{ceilings[key]:.0f}"] for key, text in names.items()
    ]
    tests = results["tests"]
    counts = ", ".join(f"{number} {word}" for word, number in tests.get("counts", {}).items()) or tests.get(
        "skipped_all"
    )
    lines += [f"Tests: {counts}.", "## Ceilings, measured in the same run\n\n" + table(("ceiling", ""), measured)]
    return "\n\n".join(lines)


def _tables(results: dict[str, Any]) -> list[str]:
    from benchmarks import blocks, kernels

    made = []
    for title, module, document in (
        ("Operations", kernels, results["kernels"]),
        ("Blocks and models", blocks, results["blocks"]),
    ):
        if document.get("rows"):
            shown = table(module.COLUMNS, map(module.cells, document["rows"]))
            formula = f"{document['formula']}.\n\n" if "formula" in document else ""
            made.append(f"## {title}\n\n{formula}{shown}")
    overhead = results["mup_overhead"]
    if "ms" in overhead:
        rows = [[name, f"{ms:.2f}", str(overhead["groups"][name])] for name, ms in overhead["ms"].items()]
        made.append(f"## A step under muP and SP\n\n{table(('', 'ms', 'optimizer groups'), rows)}")
    update = results["adamw"]
    if "ms" in update:
        rates = f"fused {update['fused_gb_s']:.0f} GB/s, a copy {update['copy_gb_s']:.0f}"
        title = f"## The update of {update['parameters']:,} parameters"
        shown = table(("", "ms"), ([name, f"{ms:.3f}"] for name, ms in update["ms"].items()))
        made.append(f"{title}\n\nIn {update['gradients']} gradients; {rates}.\n\n{shown}")
    return made


def _benchmarks(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, results[name]) for name in BENCHMARKS]


def _left_out(results: dict[str, Any]) -> str:
    rows = [[entry["what"], entry["needs"]] for name, part in _benchmarks(results) for entry in part.get("skipped", [])]
    rows += [
        [name, "failed: " + " ".join(part["error"][-1:])] for name, part in _benchmarks(results) if "error" in part
    ]
    rows += [["a test", line] for line in results["tests"].get("failed", [])]
    return "## Left out\n\n" + table(("what", "needs"), rows) if rows else ""
