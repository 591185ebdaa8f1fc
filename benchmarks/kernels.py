#!/usr/bin/env python
"""Every fused operation on a GPU: GB/s, share of the copy bandwidth, against eager torch and torch.compile.

Forward and backward at widths of DiT's proxy, of DiT-XL/2 and of MMDiT-18B, bfloat16, at least 64 MB per operand, with
a cold L2 cache. GB/s are the bytes that the operation must move (each operand and result once) over its time, so
that a kernel which moves more has fewer. The arms take turns; times are medians by CUDA events.

python benchmarks/kernels.py [--widths 288,1152,5120 --ops swiglu --out FILE]
python benchmarks/kernels.py --dry_run        # the same lines on the CPU, through Triton's interpreter
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

_OPERAND_BYTES = 64 << 20
_TOKENS = 256
COLUMNS = ("op", "width", "pass", "fused us", "GB/s", "of copy", "eager/fused", "compiled/fused")


def parser() -> argparse.ArgumentParser:
    from benchmarks.gpu_timing import common_parser

    p = common_parser(__doc__, seconds=180)
    p.add_argument("--widths", default="288,1152,5120", help="channels, by commas (default: %(default)s)")
    p.add_argument("--ops", default="all", help="operations, by commas (default: %(default)s)")
    return p


def shape_of(width: int, dry_run: bool) -> Any:
    from benchmarks.kernel_cases import Shape

    if dry_run:
        return Shape(1, 8, width)
    return Shape(max(1, _OPERAND_BYTES // (2 * _TOKENS * width)), _TOKENS, width)


def functions_of(op: Any, dry_run: bool) -> dict[str, Callable[..., Any]]:
    """The operation as three functions: by its kernel, by torch's operations, and their compilation.

    The reference is compiled, not the torch implementation: the compiler fuses what that one fuses by hand.
    """
    import torch

    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False, backend="eager" if dry_run else "inductor")
    return {"fused": op.by("fused"), "eager": op.by(op.torchs_name), "compiled": compiled}


def measure(case: Any, op: Any, shape: Any, watch: Any, dry_run: bool) -> list[dict[str, Any]]:
    """A row for the forward pass, and one for the backward pass where the operation has one."""
    import torch

    from benchmarks.gpu_timing import Arm
    from benchmarks.kernel_cases import Draw, detached

    torch._dynamo.reset()
    draw = Draw(torch.bfloat16, watch.device).tensors()
    leaves = detached(case.leaves(shape, draw))
    functions = functions_of(op, dry_run)
    results = {name: case.results(function, leaves) for name, function in functions.items()}
    given = [torch.randn_like(part) for part in results["fused"]]

    def forward(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: case.results(function, leaves)

    def backward(parts: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(parts, list(leaves.values()), given, retain_graph=True)

    moved = {
        "forward": case.forward_bytes(leaves, results["fused"]),
        "backward": case.backward_bytes(leaves, results["fused"]),
    }
    arms = {"forward": {name: Arm(forward(function)) for name, function in functions.items()}}
    if case.has_backward:
        arms["backward"] = {name: Arm(backward(parts)) for name, parts in results.items()}
    rows = []
    for direction, pair in arms.items():
        times = watch.medians(pair, cold=True)
        rows.append(
            {
                "op": op.name,
                "width": shape.width,
                "samples": shape.samples,
                "tokens": shape.tokens,
                "pass": direction,
                "bytes": moved[direction],
                "us": {name: 1000 * value for name, value in times.items()},
                "gb_s": moved[direction] / times["fused"] / 1e6,
                "eager_over_fused": times["eager"] / times["fused"],
                "compiled_over_fused": times["compiled"] / times["fused"],
            }
        )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """The row as ``COLUMNS`` show it."""
    return [
        row["op"],
        str(row["width"]),
        row["pass"],
        f"{row['us']['fused']:.1f}",
        f"{row['gb_s']:.0f}",
        f"{row['share_of_copy']:.0%}",
        f"{row['eager_over_fused']:.2f}",
        f"{row['compiled_over_fused']:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    from benchmarks.gpu_timing import finish, machine_ceilings, start
    from megadit.errors import UserError
    from megadit.tables import aligned

    watch, deadline = start(args)
    from benchmarks.kernel_cases import CASES, fused_ops
    from megadit_kernels import backends

    ops = fused_ops()
    chosen = list(ops) if args.ops == "all" else args.ops.split(",")
    for name in chosen:
        if name not in ops:
            raise UserError(f"--ops: {name} is no fused operation; choose of {', '.join(ops)}")
    widths = [32] if args.dry_run else [int(width) for width in args.widths.split(",")]
    ceilings = machine_ceilings(watch, deadline, dry_run=args.dry_run)
    rows: list[dict[str, Any]] = []
    if not args.dry_run and not backends.works("triton"):
        deadline.skip("all operations", f"a Triton that works here ({backends.backend('triton').detail})")
        chosen = []
    for width in widths:
        for name in chosen:
            if deadline.left(f"{name} at width {width}"):
                shape = shape_of(width, args.dry_run)
                rows += measure(CASES[name], ops[name], shape, watch, args.dry_run)
                for row in (row for row in rows if "share_of_copy" not in row):
                    row["share_of_copy"] = row["gb_s"] / ceilings["copy_gb_s"]
                    print("  ".join(cells(row)), flush=True)
    document = finish(args, "kernels", {"ceilings": ceilings, "rows": rows}, deadline)
    print(aligned(COLUMNS, map(cells, rows), rule=True))
    print("; ".join(f"{name} {value:.0f}" for name, value in ceilings.items() if value is not None))
    if document["note"]:
        print(document["note"])
    return 0


if __name__ == "__main__":
    from megadit.errors import run_command

    run_command(main)
