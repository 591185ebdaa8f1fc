"""The μP optimizer wrapper, which owns the learning rate, weight decay and ε of every parameter group.

μP under Adam is expressed by per-group scalars alone, because DeepSpeed's optimizers see one flat shard per group and
no parameters. The wrapper builds torch's (or DeepSpeed's) AdamW over megadit's named groups, writes
``lr = factor(step) * optim.lr * lr_mult`` before every update, and checks that the table of scalars is intact after
DeepSpeed has wrapped, stepped or restored the optimizer: schedulers and checkpoint loaders are known to overwrite all
groups with one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from megadit.config import OptimConfig
from megadit.engine.clipping import clip_plan
from megadit.engine.kernels import require_backend
from megadit.engine.schedule import Schedule
from megadit.errors import UserError
from megadit.mup.groups import clip_mults, param_groups
from megadit.mup.spec import ParamSpec, param_specs

_TABLE_KEYS = ("name", "lr_mult", "wd_mult", "eps_mult")


class MuOptimizer:
    """AdamW over μP's parameter groups, with the schedule applied by multiplication only.

    specs: of the whole model, where ``model`` is a chunk of it (None: those of ``model``).  pad: makes a parameter for
    a group without members in this chunk, since all chunks must have the same groups.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        schedule: Schedule,
        device: torch.device,
        specs: Mapping[str, ParamSpec] | None = None,
        pad: Callable[[], nn.Parameter] | None = None,
    ) -> None:
        self.config = config
        self.schedule = schedule
        specs = param_specs(model) if specs is None else specs
        groups = param_groups(model, config, specs)
        for group in groups:
            if not group["params"] and pad is not None:
                group["params"] = [pad()]
        self.table: list[dict[str, Any]] = [{key: group[key] for key in _TABLE_KEYS} for group in groups]
        roles = tuple(group["role"] for group in groups)
        self.clip = clip_plan(roles, clip_mults(specs), config.clip)
        self.implementation = resolve_implementation(config.implementation, device)
        self.inner = _build(groups, config, self.implementation)
        self.apply(0)

    def apply(self, step: int) -> None:
        """Write the learning rates of the update that follows ``step`` completed ones."""
        factor = self.schedule.factor(step)
        for group, row in zip(self.inner.param_groups, self.table, strict=True):
            group["lr"] = factor * self.config.lr * row["lr_mult"]

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each group, by name."""
        return {group["name"]: float(group["lr"]) for group in self.inner.param_groups}

    def base_lr(self, step: int) -> float:
        """Base learning rate (what lr_mult 1 gets) of the update after ``step`` completed ones."""
        return self.schedule.factor(step) * self.config.lr

    def check_table(self, step: int, moment: str) -> None:
        """Compare every group with the table, as of the update that ``apply(step)`` prepared.

        Raises:
            RuntimeError: a group's lr, weight decay or ε was overwritten; ``moment`` says when it was found.
        """
        factor = self.schedule.factor(step)
        names = [group.get("name") for group in self.inner.param_groups]
        expected_names = [row["name"] for row in self.table]
        if names != expected_names:
            raise RuntimeError(f"{moment}: the optimizer's groups are {names}, not {expected_names}")
        for group, row in zip(self.inner.param_groups, self.table, strict=True):
            expected = {
                "lr": factor * self.config.lr * row["lr_mult"],
                "weight_decay": self.config.weight_decay * row["wd_mult"],
                "eps": self.config.eps * row["eps_mult"],
            }
            for key, value in expected.items():
                if not math.isclose(float(group[key]), value, rel_tol=1e-9, abs_tol=0.0):
                    raise RuntimeError(
                        f"{moment}: group '{row['name']}' has {key} {float(group[key]):.6g} where the muP table says "
                        f"{value:.6g}; something overwrote the optimizer's groups"
                    )


def resolve_implementation(implementation: str, device: torch.device) -> str:
    """``optim.implementation`` with ``auto`` resolved: torch's fused AdamW where the device has it (CUDA and CPU).

    Not megadit's own kernel, ``fused``, as long as no GPU has been found on which it is faster.

    Raises:
        UserError: deepspeed-fused without a GPU.
    """
    if implementation == "auto":
        return "torch-fused" if device.type in ("cuda", "cpu") else "torch-foreach"
    if implementation == "deepspeed-fused" and device.type != "cuda":
        raise UserError(
            "optim.implementation: deepspeed-fused is a CUDA kernel and there is no GPU here; use auto or torch-fused"
        )
    return implementation


def check_implementation(implementation: str, device: torch.device) -> None:
    """Whether this machine can run what is asked for by name; where there is a GPU, by launching on the current one.

    Raises:
        UserError: fused or apex without a GPU, Triton or NVIDIA's apex.
    """
    needed = {"fused": ("triton", "Triton"), "apex": ("apex", "NVIDIA's apex")}.get(implementation)
    if needed is not None:
        require_backend("optim.implementation", implementation, needed, device.type, "torch-fused")


def _build(groups: list[dict[str, Any]], config: OptimConfig, implementation: str) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": 0.0}
    if implementation == "torch-fused":
        return torch.optim.AdamW(groups, fused=True, **common)
    if implementation == "torch-foreach":
        return torch.optim.AdamW(groups, foreach=True, **common)
    if implementation in ("fused", "apex"):
        from megadit_kernels.adamw import ApexAdamW, FusedAdamW

        return (FusedAdamW if implementation == "fused" else ApexAdamW)(groups, **common)
    if implementation == "deepspeed-fused":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **common)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
