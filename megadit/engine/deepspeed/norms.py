"""Gradient norms by role inside DeepSpeed's step, and clipping by them. With ``partitions`` the door to its internals.

DeepSpeed computes the norm of each of its buffers on the way to the global one (one per group at stages 1 and 2, one
per sub group at stage 3, reduced over the ranks), so the norms by role cost nothing: they are read as they pass.
Where a threshold per role is asked for, each buffer is unscaled and clipped by DeepSpeed's own code, given its role's
norm and threshold in place of the global ones. At stage 0 gradients are whole before the step and are clipped there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadit.engine.clipping import ClipPlan
from megadit.engine.deepspeed.guard import LossScaleExhausted, UpdateGuard, watch_clipping
from megadit.mup.spec import Role
from megadit.parallel.tensor import is_shard


class RoleNorms:
    """Norms of the last step's gradients by role: reduced, without the loss scale, before clipping."""

    def __init__(self, engine: Any, stage: int, plan: ClipPlan, guard: UpdateGuard) -> None:
        self._engine, self._stage, self._plan, self._guard = engine, stage, plan, guard
        self._of_roles: dict[Role, Tensor] = {}
        self._scale = 1.0
        if stage == 0 and engine.gradient_clipping() > 0:
            watch_clipping(engine, guard.see_total)
        elif stage in (1, 2):
            self._watch_groups(engine.optimizer)
        elif stage == 3:
            self._watch_sub_groups(engine.optimizer)

    def before_step(self, wanted: bool) -> None:
        """Between backward and step: at stage 0 take the norms if ``wanted`` or needed, and clip by them."""
        self._of_roles = {}
        self._guard.begin()
        limits = self._plan.limits
        if self._stage > 0 or (self._engine.gradient_clipping() > 0 and not (wanted or limits)):
            return
        grads: dict[Role, list[Tensor]] = {}
        for role, group in zip(self._plan.roles, self._engine.optimizer.param_groups, strict=True):
            grads.setdefault(role, []).extend(p.grad for p in group["params"] if p.grad is not None)
        if self._engine.mpu is None:
            self._of_roles = {role: torch.nn.utils.get_total_norm(own) for role, own in grads.items() if own}
        else:
            self._of_roles = self._over_shares()
        self._guard.see(self._of_roles)
        for role, norm in self._of_roles.items():
            if limits and role in limits:
                torch._foreach_mul_(grads[role], 1.0 / ((norm + 1e-6) / limits[role]).clamp(min=1.0))

    def _over_shares(self) -> dict[Role, Tensor]:
        """Norms at stage 0 where ranks share layers: shares counted on every rank, what all hold on the first."""
        roles = sorted(set(self._plan.roles))
        mpu, device = self._engine.mpu, self._engine.device
        squares = torch.zeros(len(roles), dtype=torch.float64, device=device)
        for role, group in zip(self._plan.roles, self._engine.optimizer.param_groups, strict=True):
            for p in group["params"]:
                if p.grad is not None and (is_shard(p) or mpu.get_model_parallel_rank() == 0):
                    squares[roles.index(role)] += p.grad.double().square().sum()
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return dict(zip(roles, squares.sqrt().float().unbind(), strict=True))

    def values(self) -> dict[Role, float]:
        """The norms of the last step; infinite where an entry was not finite, and all of an update that was skipped."""
        if not self._of_roles:
            return dict.fromkeys(self._plan.roles, math.inf)
        norms = {role: float(norm) / self._scale for role, norm in self._of_roles.items()}
        return {role: norm if math.isfinite(norm) and norm >= 0 else math.inf for role, norm in norms.items()}

    def total(self) -> float:
        """The norm over all roles."""
        return math.hypot(*self.values().values())

    def _keep(self, norms: Sequence[Tensor], roles: Sequence[Role], scale: float) -> None:
        """Combine norms of buffers into those of roles. DeepSpeed says -1 for a norm that is not finite."""
        self._scale = scale
        whole: dict[Role, list[Tensor]] = {}
        for role, norm in zip(roles, norms, strict=True):
            whole.setdefault(role, []).append(norm)
        self._of_roles = {role: _combined(parts) for role, parts in whole.items()}
        self._guard.see(self._of_roles)

    def _watch_groups(self, zero: Any) -> None:
        seen: list[Tensor] = []
        # The second takes the place of the first where the optimizer's state is on the CPU.
        for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            setattr(zero, name, _recording(getattr(zero, name), seen))
        total, clip = zero.scaled_global_norm, zero.unscale_and_clip_grads

        def scaled_global_norm(*args: Any, **kwargs: Any) -> Tensor:
            seen.clear()
            result: Tensor = total(*args, **kwargs)
            self._keep(seen, self._plan.roles, float(zero.loss_scale))
            return result

        def unscale_and_clip_grads(flat: list[Tensor], norm: Tensor) -> None:
            buffers = zero.single_partition_of_fp32_groups
            group = next(i for i, buffer in enumerate(buffers) if buffer.grad is flat[0])
            self._clipped(zero, self._plan.roles[group], lambda own: clip(flat, norm if own is None else own))

        zero.scaled_global_norm = scaled_global_norm
        if self._plan.limits is not None:
            zero.unscale_and_clip_grads = unscale_and_clip_grads

    def _watch_sub_groups(self, zero: Any) -> None:
        of_sub_groups, clip = zero._get_norm_groups, zero.unscale_and_clip_grads
        roles = [self._plan.roles[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups))]

        def _get_norm_groups() -> list[Tensor]:
            norms: list[Tensor] = of_sub_groups()
            self._keep(norms, roles, float(zero.loss_scale))
            return norms

        def unscale_and_clip_grads(sub_group: int, norm: Tensor) -> None:
            self._clipped(zero, roles[sub_group], lambda own: clip(sub_group, norm if own is None else own))

        zero._get_norm_groups = _get_norm_groups
        if self._plan.limits is not None:
            zero.unscale_and_clip_grads = unscale_and_clip_grads

    def _clipped(self, zero: Any, role: Role, clip: Callable[[Tensor | None], None]) -> None:
        """Let DeepSpeed unscale and clip one buffer by its role's norm and threshold."""
        assert self._plan.limits is not None
        limit = self._plan.limits.get(role)
        before = zero.clip_grad
        zero.clip_grad = 0.0 if limit is None else limit
        try:
            clip(None if limit is None else self._of_roles[role])
        finally:
            zero.clip_grad = before


def hold_loss_scale(zero: Any) -> None:
    """Let a dynamic loss scale grow after the update instead of within it.

    DeepSpeed 0.19 doubles the scale between the norm and the unscaling, so that once every ``loss_scale_window``
    steps the gradients are divided by twice what they were multiplied by. A step then raises LossScaleExhausted where
    gradients overflow at the smallest scale.
    """
    step, update = zero.step, zero._update_scale
    postponed: list[bool] = []

    def _update_scale(has_overflow: bool = False) -> None:
        if has_overflow:
            try:
                update(True)
            except Exception as error:  # DeepSpeed has no type of its own for it
                raise LossScaleExhausted(float(zero.loss_scale)) from error
        else:
            postponed.append(False)

    def held(*args: Any, **kwargs: Any) -> Any:
        postponed.clear()
        result = step(*args, **kwargs)
        for overflow in postponed:
            update(overflow)
        return result

    zero._update_scale, zero.step = _update_scale, held


def _recording(method: Callable[..., Tensor], seen: list[Tensor]) -> Callable[..., Tensor]:
    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        norm = method(*args, **kwargs)
        seen.append(norm)
        return norm

    return recorded


def _combined(norms: Sequence[Tensor]) -> Tensor:
    """The norm over several buffers; one alone stays what it is."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack([norm.to(norms[0].device).double() for norm in norms])
    total = stacked.square().sum().sqrt().to(norms[0].dtype)
    return torch.where((stacked < 0).any(), -torch.ones_like(total), total)
