"""``train.precision: fp8``: refused where the hardware or a package cannot, and described."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from megadit.config import RunConfig
from megadit.errors import UserError, one_line
from megadit.models import build_model
from megadit.models.float8 import float8_candidates
from megadit_kernels.backends import backend
from megadit_kernels.float8 import Float8Products


def check_float8(config: RunConfig, device: torch.device) -> None:
    """Whether FP8 products work as configured; on a GPU one is computed there. Nothing for another precision.

    Raises:
        UserError: the GPU has no FP8 units, transformer-engine does not work, or ``bf16_layers`` name no layer.
    """
    fp8 = config.train.fp8
    if config.train.precision != "fp8":
        return
    if fp8.bf16_layers:
        names = [name for name, _ in float8_candidates(build_model(config.model, device="meta"))]
        for pattern in fp8.bf16_layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"train.fp8.bf16_layers: {pattern!r} fits no layer that would multiply in FP8; write names like "
                    f"{names[0]}"
                )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise UserError(
                f"train.precision: fp8 needs FP8 units, which {torch.cuda.get_device_name(device)} (compute capability "
                f"{capability[0]}.{capability[1]}) lacks; use bf16, or a GPU of 8.9 or later, such as H100"
            )
    if fp8.backend == "transformer-engine":
        probe = backend("transformer-engine")
        if not probe.works:
            raise UserError(
                f"train.fp8.backend: transformer-engine does not work here ({probe.detail}); set it to torch"
            )
    elif device.type == "cuda" and fp8.scaling != "block":
        _try_product(Float8Products(fp8.scaling), device)


def describe_float8(config: RunConfig, layers: int, device: torch.device) -> str:
    """One line: how many of this rank's layers multiply in FP8, and how."""
    fp8 = config.train.fp8
    how = "torch._scaled_mm" if fp8.backend == "torch" else "transformer-engine"
    emulated = "; emulated on the CPU, for tests: slower than bf16" if device.type != "cuda" else ""
    return f"fp8: {layers} linear layers by {how}, a scale per {fp8.scaling}{emulated}"


def _try_product(products: Float8Products, device: torch.device) -> None:
    x = torch.ones(32, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(48, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        out = products.linear(x, weight, None, 0.5)
        out.sum().backward()
        assert weight.grad is not None
        right = bool((out == 32).all()) and bool((weight.grad == 16).all())
    except RuntimeError as error:
        raise UserError(
            f"train.fp8.scaling: {products.scaling} does not work with this torch and GPU ({one_line(error)}); set "
            f"train.fp8.scaling={'row' if products.scaling == 'tensor' else 'tensor'}, or train.precision=bf16"
        ) from error
    if not right:
        raise UserError("train.precision: fp8 gives wrong products with this torch and GPU; use bf16")
