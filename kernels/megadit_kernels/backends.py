"""Probes which kernel backends work on this machine.

An installed package may not work: transformer-engine raises RuntimeError without its GPU stack, flash-attn fails at
import where it was built for another torch, and the package ``apex`` on the Python package index is not NVIDIA's. So
each probe imports the compiled module and makes one tiny call; an error is recorded as the reason. Probes run on the
first query, once per process.

A probe that uses CUDA initialises it in the calling process: do not query before forking.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Backend:
    """Result of a probe.

    ``state``: ok, missing (not installed, or no hardware for it) or broken (installed, but a call failed). ``detail``:
    version or device where it works, else the reason; ``remedy``: what would help, empty if nothing would.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""

    @property
    def works(self) -> bool:
        return self.state == "ok"


class Unavailable(Exception):
    """Raised by a probe where the package is not installed, or the hardware is missing. Args: reason, remedy."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


@functools.cache
def backend(name: str) -> Backend:
    """Probe the backend ``name``, one of ``backend_names()``. Raises KeyError for another name."""
    probe = _probes()[name]
    try:
        return Backend(name, "ok", probe())
    except Unavailable as reason:
        return Backend(name, "missing", str(reason), reason.remedy)
    except Exception as error:  # compiled extensions raise anything: RuntimeError, OSError, AttributeError
        first_line = (str(error).strip() or "no message").splitlines()[0][:200]
        return Backend(name, "broken", f"{type(error).__name__}: {first_line}", _remedies().get(name, ""))


def backend_names() -> tuple[str, ...]:
    """The names of all backends, in the order of a report."""
    return tuple(_probes())


def works(name: str) -> bool:
    """Whether the backend's probe succeeded."""
    return backend(name).works


def _probes() -> dict[str, Callable[[], str]]:
    return {
        "cuda": _cuda,
        "bf16": _bf16,
        "tf32": _tf32,
        "fp8": _fp8,
        "triton": _triton,
        "flash-sdpa": _flash_sdpa,
        "varlen": _varlen,
        "flash-attn": _flash_attn,
        "transformer-engine": _transformer_engine,
        "apex": _apex,
        "apex-norm": _apex_norm,
    }


def _remedies() -> dict[str, str]:
    return {
        "triton": "reinstall torch: each CUDA build of torch requires its own exact triton",
        "flash-attn": "build it for this torch: pip install --no-build-isolation --force-reinstall flash-attn",
        "transformer-engine": "pip install --no-build-isolation 'transformer-engine[pytorch]', for this torch and CUDA",
        "apex": "build NVIDIA apex from its source for this torch and CUDA",
        "apex-norm": "build NVIDIA apex from its source for this torch and CUDA",
    }


def _installed(module: str, distribution: str, remedy: str) -> str:
    """The distribution's version. Raises Unavailable if the module cannot be found."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable("not installed", remedy)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _torch() -> ModuleType:
    if importlib.util.find_spec("torch") is None:
        raise Unavailable("torch is not installed", "make setup")
    return importlib.import_module("torch")


def _need_cuda(version: str = "") -> ModuleType:
    """torch, on a machine with a CUDA device that it can use. Raises Unavailable otherwise."""
    torch = _torch()
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        raise Unavailable(f"{version + ' is installed, but ' if version else ''}{reason}")
    return torch


def _assert_close(torch: ModuleType, actual: object, expected: object, tolerance: float) -> None:
    """Raise where a result is wrong: a kernel for another architecture can fail without an error."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def _cuda() -> str:
    torch = _need_cuda()
    value = torch.full((8,), 2.0, device="cuda")
    _assert_close(torch, value.square().sum().cpu(), torch.tensor(32.0), 0.0)
    return f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _bf16() -> str:
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    _assert_close(torch, (ones @ ones).float().cpu(), torch.full((16, 16), 16.0), 0.0)
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
        return "native" if native else "emulated by this GPU, slow"
    return f"runs on the CPU ({torch.backends.cpu.get_cpu_capability()}), mostly slower than fp32: for tests"


def _tf32() -> str:
    torch = _need_cuda()
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise Unavailable(f"compute capability {major}.{minor} has no TF32 (8.0 and later have)")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        raise Unavailable("NVIDIA_TF32_OVERRIDE=0 switches it off", "unset NVIDIA_TF32_OVERRIDE")
    return f"compute capability {major}.{minor}; train.tf32 switches it, auto in float32 training"


def _fp8() -> str:
    torch = _need_cuda()
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise Unavailable(f"compute capability {capability[0]}.{capability[1]} has no FP8 (8.9 and later have)")
    ones = torch.ones(16, 16, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.ones((), device="cuda")
    product = torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    _assert_close(torch, product.float().cpu(), torch.full((16, 16), 16.0), 0.0)
    return f"compute capability {capability[0]}.{capability[1]}"


def _triton() -> str:
    version = _installed("triton", "triton", "comes with a CUDA build of torch")
    torch = _need_cuda(version)
    from megadit_kernels._triton_probe import double

    x = torch.arange(32, device="cuda", dtype=torch.float32)
    _assert_close(torch, double(x), 2 * x, 0.0)
    return version


def _flash_sdpa() -> str:
    torch = _need_cuda()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 16, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        actual = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    _assert_close(torch, actual, expected, 2e-2)
    return "torch's flash attention"


def _varlen() -> str:
    torch = _need_cuda()
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    from megadit_kernels.attention.flash import by_torch, try_kernel

    try_kernel(by_torch, "cuda")
    return f"varlen_attn of torch {torch.__version__}"


def _flash_attn() -> str:
    remedy = "optional, needs a GPU: pip install -e .[flash]"
    three = importlib.util.find_spec("flash_attn_interface") is not None
    version = _installed(*(("flash_attn_interface", "flash_attn_3") if three else ("flash_attn", "flash-attn")), remedy)
    _need_cuda(version)
    from megadit_kernels.attention.flash import FLASH_ATTN, flash_attn_interface

    module = flash_attn_interface().__name__
    generation, distribution = (3, "flash_attn_3") if module == FLASH_ATTN[0][0] else (2, "flash-attn")
    return f"flash-attn {generation} ({_installed(module, distribution, remedy)})"


def _transformer_engine() -> str:
    remedy = "optional, needs a GPU: pip install -e .[te]"
    version = _installed("transformer_engine", "transformer-engine", remedy)
    torch = _need_cuda(version)
    te = importlib.import_module("transformer_engine.pytorch")
    layer = te.Linear(16, 16, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(16, 16, device="cuda", dtype=torch.bfloat16)
    _assert_close(torch, layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), 5e-2)
    return version


def _installed_apex(module: str) -> str:
    """apex's version. Raises Unavailable without its compiled ``module``: another package may be called apex."""
    remedy = "optional, needs a GPU: build NVIDIA apex from its source (CONTRIBUTING.md)"
    if importlib.util.find_spec(module) is None and importlib.util.find_spec("apex") is not None:
        raise Unavailable(f"the package apex that is installed is not NVIDIA's, or built without {module}", remedy)
    return _installed(module, "apex", remedy)


def _apex_norm() -> str:
    version = _installed_apex("fused_layer_norm_cuda")
    torch = _need_cuda(version)
    apex = importlib.import_module("apex.normalization.fused_layer_norm")
    x = torch.arange(64.0, device="cuda").view(2, 32)
    _assert_close(torch, apex.fused_layer_norm(x, (32,), 1e-5), torch.nn.functional.layer_norm(x, (32,)), 1e-4)
    return version


def _apex() -> str:
    version = _installed_apex("amp_C")
    torch = _need_cuda(version)
    amp = importlib.import_module("amp_C")
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
    x = torch.ones(16, device="cuda")
    apply(amp.multi_tensor_scale, overflow, [[x], [x]], 3.0)
    _assert_close(torch, x.cpu(), torch.full((16,), 3.0), 0.0)
    return version
