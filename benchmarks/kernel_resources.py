"""Compile every Triton kernel for A100, H200 and B200 without a GPU: registers, spills, width of accesses.

The launchers run on CPU tensors under a driver that compiles to machine code and launches nothing, so that each kernel
is specialised exactly as in training. ``cuobjdump`` of Triton's wheel reads the code. Needs Triton, which must not be
told to interpret (TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if TYPE_CHECKING:
    import torch

ARCHITECTURES = (80, 90, 100)
WIDTHS = (144, 288, 576, 1152, 1536, 2560, 5120, 8192)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # names of torch


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. ``stack_bytes`` are spilled registers; ``narrow`` are global loads and stores below 16
    bytes per thread, ``wide`` those of 16."""

    op: str
    kernel: str
    width: int
    dtype: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    wide: int
    narrow: int
    local: int

    @property
    def key(self) -> str:
        return f"{self.op} {self.kernel} {self.width} {self.dtype} sm_{self.arch}"


class _Driver:
    """As much of Triton's CUDA driver as compiling asks for. Triton caches kernels by device: one per architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def set_current_device(self, device: Any) -> None:
        pass

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def compile_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, kernels are compiled for ``sm_<arch>`` instead of launched; gives their names and compiled forms."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(function, *arguments, grid=grid, warmup=True, **options)
        compiled.append((function.__name__, kernel))
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = record
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None  # reset_active would look for a GPU


def norm_modulate(width: int, dtype: torch.dtype) -> None:
    """Gated residual, norm and modulation as a DiT block has them, forward and backward."""
    import torch

    from megadit_kernels.norm_modulate import fused

    x = torch.zeros(2, 256, width, dtype=dtype)
    gate, shift, scale, *_ = torch.zeros(2, 6 * width, dtype=dtype).chunk(6, dim=1)
    new_x, _, mean, rstd = fused.forward(x, x, gate, None, shift, None, scale, None, 1e-6, "layer", 1.0)
    fused.backward(new_x, x, x, x, gate, None, scale, None, mean, rstd, "layer", 1.0)


def affine_norm(width: int, dtype: torch.dtype) -> None:
    """Residual and LayerNorm with gain and bias as a U-ViT block has them, forward and backward."""
    import torch

    from megadit_kernels.norm_modulate import fused

    x, gain = torch.zeros(2, 256, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    new_x, _, mean, rstd = fused.forward(x, x, None, None, None, gain, None, gain, 1e-5, "layer", 0.0)
    fused.backward(new_x, x, x, None, None, None, None, gain, mean, rstd, "layer", 0.0)


def swiglu(width: int, dtype: torch.dtype) -> None:
    """Bias and SwiGLU's product, of a hidden layer of 4 times the width; so many rows that programs loop."""
    import torch

    from megadit_kernels.swiglu import fused

    h, bias = torch.zeros(4096, 8 * width, dtype=dtype), torch.zeros(8 * width, dtype=dtype)
    fused.backward(h, bias, fused.forward(h, bias))


def gelu_tanh(width: int, dtype: torch.dtype, approximate: str = "tanh") -> None:
    """Bias and GELU, of a hidden layer of 4 times the width."""
    import torch

    from megadit_kernels.gelu import fused

    h, bias = torch.zeros(4096, 4 * width, dtype=dtype), torch.zeros(4 * width, dtype=dtype)
    fused.backward(h, bias, fused.forward(h, bias, approximate), approximate)


def gelu_erf(width: int, dtype: torch.dtype) -> None:
    """The same by the error function."""
    gelu_tanh(width, dtype, "none")


def noise(width: int, dtype: torch.dtype) -> None:
    """Noise, its mixture and the error of samples of 4 channels, ``width`` pixels each; the output is in ``dtype``."""
    import torch

    from megadit_kernels.noise import fused

    keys, level = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    noise = fused.launch_normal(keys, (4, width))
    _, target = fused.launch_mix(noise, keys, level, level, "v")
    output = target.to(dtype)
    fused.launch_error_backward(output, target, level, fused.launch_error(output, target, level))


# Heads of each width, as models of that width or their tensor-parallel shares have them.
HEAD_DIMS = {144: 36, 288: 36, 576: 72, 1152: 72, 1536: 64, 2560: 128, 5120: 128, 8192: 128}


def qk_norm(width: int, dtype: torch.dtype) -> None:
    """Norm of the queries and keys of both streams of an MMDiT block, into one sequence; so many that programs loop."""
    import torch

    from megadit_kernels.qk_norm import fused

    d = HEAD_DIMS[width]
    heads = width // d
    image = torch.zeros(-(-128 // heads), 256, 3, heads, d, dtype=dtype)
    context, gain = image[:, :120].clone(), torch.ones(d, dtype=dtype)
    gains = (gain, gain, gain, gain)
    q, k, v = fused.forward(image, context, *gains, True, 1e-6)
    fused.backward(q, k, v, image, context, *gains, 256, True, 1e-6)


def adamw(width: int, dtype: torch.dtype) -> None:
    """The update of a flat shard with gradients and a copy of ``dtype``."""
    import torch

    from megadit_kernels.adamw import Shard
    from megadit_kernels.adamw.fused import Updater

    master, gradient, gate = torch.zeros(16 * width), torch.zeros(16 * width, dtype=dtype), torch.zeros(())
    shard = Shard(master, master, master, gate, (gradient,), 1e-3, 0.1, 1e-8, copy=gradient)
    Updater()([shard], (0.9, 0.999), gate)


def variance_bound(width: int, dtype: torch.dtype) -> None:
    """The bound of samples of 4 channels, ``width`` pixels each, of which the model says noise and variance."""
    import torch

    from megadit_kernels.variance_bound import fused

    prediction, variance = torch.zeros(2, 8, width, dtype=dtype).chunk(2, dim=1)
    x, coefficients = torch.zeros(2, 4, width), torch.zeros(2, 7)
    bound = fused.forward(variance, prediction, x, x, coefficients, "noise")
    fused.backward(variance, prediction, x, x, coefficients, bound, "noise")


CASES: dict[str, Callable[[int, torch.dtype], None]] = {
    "norm_modulate": norm_modulate,
    "affine_norm": affine_norm,
    "swiglu": swiglu,
    "noise": noise,
    "variance_bound": variance_bound,
    "qk_norm": qk_norm,
    "adamw": adamw,
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
}


def resources_of(kernel: Any) -> dict[str, int]:
    """What cuobjdump says of the machine code, and how wide PTX loads and stores."""
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(dump), "--dump-resource-usage", file.name], capture_output=True, encoding="utf-8", check=True
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if numbers is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage.stdout[:200]}")
    ptx = kernel.asm["ptx"]
    accesses = Counter(
        int(lanes or 1) * int(bits) for lanes, bits in re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    )
    return {
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wide": accesses[128],
        "narrow": sum(accesses.values()) - accesses[128],
        "local": len(re.findall(r"\b(?:ld|st)\.local\b", ptx)),
    }


def measure(widths: tuple[int, ...], architectures: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Resources]:
    """Compile all; a row per kernel, width, dtype and architecture: of several forms of a kernel the last."""
    import torch

    rows: dict[str, Resources] = {}
    for arch in architectures:
        for width in widths:
            for dtype in dtypes:
                for op, case in CASES.items():
                    with compile_only(arch) as compiled:
                        case(width, getattr(torch, DTYPES[dtype]))
                    for name, kernel in compiled:
                        row = Resources(op, name, width, dtype, arch, **resources_of(kernel))
                        rows[row.key] = row
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--widths", default=",".join(map(str, WIDTHS)), help="channels, by commas (default: %(default)s)"
    )
    parser.add_argument("--archs", default=",".join(map(str, ARCHITECTURES)), help="sm_ numbers (default: %(default)s)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of the operands (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    widths, archs = (tuple(map(int, text.split(","))) for text in (options.widths, options.archs))
    rows = measure(widths, archs, tuple(options.dtypes.split(",")))
    if options.out:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    from megadit.tables import aligned

    header = ["kernel", "registers", "stack B", "shared B", "warps", "16 B", "narrower"]
    print(aligned(header, [[row.key, *map(str, (row.registers, row.stack_bytes, row.shared_bytes, row.warps, row.wide,
                                                 row.narrow))] for row in rows]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
