"""The implementations of fused operations that a run uses: refused, selected and described by ``kernels.*``."""

from __future__ import annotations

from typing import Any

from megadit.config.schema.kernels import KernelConfig
from megadit.errors import UserError
from megadit.parallel.recompute import Recompute
from megadit_kernels import OPS_OF_KEY, Op, attention, residual_norm_modulate
from megadit_kernels.backends import Backend, backend

# The backend that a choice needs, and what people call it.
_BACKENDS = {
    "fused": ("triton", "Triton"),
    "apex": ("apex-norm", "NVIDIA apex"),
    "varlen": ("varlen", "torch's varlen attention"),
    "flash-attn": ("flash-attn", "flash-attn"),
}


def check_kernels(config: KernelConfig, device: str) -> None:
    """Whether this machine can run what is asked for. ``device``: the type of the device that trains, cuda or cpu.

    Where a kernel is asked for by name and there is a GPU, one is launched on this process's current device.

    Raises:
        UserError: a kernel without a GPU, or with a Triton, an apex or a flash attention that does not work.
    """
    for key, choice in _by_name(config).items():
        require_backend(
            f"kernels.{key}", choice, _BACKENDS[choice], device, "sdpa" if key == "attention" else "reference"
        )


def require_backend(key: str, choice: str, needed: tuple[str, str], device: str, other: str) -> None:
    """Refuse ``key``'s ``choice`` where ``needed``, a backend and what people call it, does not work on ``device``.

    ``other``: the choice beside auto that works everywhere.

    Raises:
        UserError: there is no GPU, or the backend does not work.
    """
    name, package = needed
    probe = backend(name)
    if device != "cuda" or not probe.works:
        raise UserError(
            f"{key}: {choice} needs a GPU and {package} ({_why_not(probe, package)}); set {key}=auto or {other}"
        )


def select_kernels(config: KernelConfig) -> None:
    """From now on this process's layers call what ``config`` says."""
    for key, ops in OPS_OF_KEY.items():
        choice = getattr(config, key)
        for op in ops:
            op.select("torch" if choice == "reference" else choice)


def select_for_inference(config: KernelConfig, device: str) -> str | None:
    """As ``select_kernels``, but a kernel that was asked for by name is auto: pictures are drawn on other machines than
    the one that trained, and on the CPU of a machine with a GPU.

    Returns one line where ``device``, the best of this machine, cannot run what was asked for; else None.
    """
    asked = _by_name(config)
    select_kernels(config.model_copy(update=dict.fromkeys(asked, "auto")))
    missing: dict[str, list[str]] = {}
    for key, choice in asked.items():
        probe = backend(_BACKENDS[choice][0])
        if device != "cuda" or not probe.works:
            reason = "there is no GPU" if probe.works else f"{_BACKENDS[choice][1]}: {probe.detail}"
            missing.setdefault(reason, []).append(f"kernels.{key}={choice}")
    if not missing:
        return None
    reasons = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in missing.items())
    return f"not available here, so what auto chooses runs: {reasons}"


def _by_name(config: KernelConfig) -> dict[str, str]:
    """The keys whose kernel is asked for by name, and needs a GPU."""
    return {key: getattr(config, key) for key in OPS_OF_KEY if getattr(config, key) in _BACKENDS}


def adds_across_blocks(config: KernelConfig, device: str, recompute: Recompute) -> bool:
    """Whether blocks leave their last residual to the next: ``kernels.residual_across_blocks``.

    auto: not where blocks are recomputed, which then save branch and gate beside the tokens that they begin with.
    """
    if config.residual_across_blocks != "auto":
        return config.residual_across_blocks
    return recompute == "none" and residual_norm_modulate.backend_on(device) == "fused"


def describe_kernels(config: KernelConfig, device: str, recompute: Recompute = "none", precision: str = "bf16") -> str:
    """One line: what runs of each key, and why where it is not the fused kernel. precision: ``train.precision``."""
    keys_of: dict[str, list[str]] = {}
    for key, ops in OPS_OF_KEY.items():
        if key == "attention":
            continue
        keys_of.setdefault(_implementation(ops[0], getattr(config, key), device), []).append(key)
    lines = [f"{', '.join(keys)} {how}" for how, keys in keys_of.items()]
    if adds_across_blocks(config, device, recompute):
        lines.append("a block's last residual within the next block's norm")
    return "kernels: " + "; ".join([*lines, f"attention {_attention(config, device, precision)}"])


def _attention(config: KernelConfig, device: str, precision: str) -> str:
    runs = attention.backend_on(device)
    if config.attention == "sdpa":
        reason = "as configured"
    elif device != "cuda":
        reason = "training is on the CPU"
    elif precision == "fp32":
        runs, reason = "sdpa", "train.precision is fp32"
    else:
        reason = backend("varlen" if runs == "sdpa" else runs).detail
    return f"by {runs} ({reason})"


def _implementation(op: Op[Any, Any], choice: str, device: str) -> str:
    runs = op.backend_on(device)
    if runs == "fused":
        return "fused by Triton"
    if runs == "apex":
        return "by NVIDIA apex"
    return f"by {runs} ({'as configured' if choice == 'reference' else _why_not(backend('triton'), 'Triton')})"


def _why_not(probe: Backend, package: str) -> str:
    return "training is on the CPU" if probe.works else f"{package}: {probe.detail}"
