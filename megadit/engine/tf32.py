"""TF32: whether a GPU multiplies float32 matrices with 10 bits of mantissa, several times faster (``train.tf32``)."""

from __future__ import annotations

import os

import torch

from megadit.config.schema.run import TrainConfig

# A GPU has TF32 units from this compute capability on (Ampere).
_CAPABILITY = (8, 0)


def tf32_parts(config: TrainConfig) -> tuple[bool, bool]:
    """Whether float32 matrix products run in TF32, and whether float32 convolutions do.

    auto: products where ``train.precision`` is fp32; convolutions always, as torch has it by default. Under bf16 and
    fp16 the products that remain in float32 are there for their accuracy.
    """
    if config.tf32 == "auto":
        return config.precision == "fp32", True
    return config.tf32, config.tf32


def arithmetic(config: TrainConfig) -> str:
    """What multiplies matrices on a GPU with TF32 units: ``train.precision``, or tf32 where that takes its place."""
    return "tf32" if config.precision == "fp32" and tf32_parts(config)[0] else config.precision


def set_tf32(config: TrainConfig, device: str) -> None:
    """From now on this process multiplies on a GPU as ``config`` says; nothing changes where ``device`` is not cuda.

    Set by torch's older flags, which torch 2.11 and 2.13 pass on to ``fp32_precision``. After a setting of
    ``fp32_precision`` alone, ``torch.get_float32_matmul_precision`` raises, which torch.compile calls.
    """
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32_parts(config)


def describe_tf32(config: TrainConfig, device: str) -> str | None:
    """One line: what runs in TF32, and why where it differs from what was asked for; None on a CPU, unless asked for.

    Takes the capability of this process's current GPU.
    """
    if device != "cuda":
        return "TF32: train.tf32 true has no effect on a CPU" if config.tf32 is True else None
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"TF32: none, this GPU has compute capability {capability[0]}.{capability[1]}, TF32 begins at 8.0"
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "TF32: none, NVIDIA_TF32_OVERRIDE=0 switches it off"
    products, convolutions = tf32_parts(config)
    parts = [name for name, on in (("matrix products", products), ("convolutions", convolutions)) if on]
    reason = "" if config.tf32 == "auto" else ", as configured"
    return f"TF32: float32 {' and '.join(parts)}{reason}" if parts else f"TF32: none{reason}"
