"""What megadit needs of DeepSpeed's internals, a class per ZeRO stage. Written against DeepSpeed 0.19.

=================  =========================  ====================================  =================================
                   stage 0 (no buffers)       stage 1, 2 (one buffer per group)     stage 3 (one buffer per sub group)
=================  =========================  ====================================  =================================
float32 masters    the parameters             ``single_partition_of_fp32_groups``   ``fp32_partitioned_groups_flat``
of a rank          all                        a range of the group's concatenation  an equal share of each parameter
norm per role      in ``before_step``         ``get_grad_norm_direct``, on the CPU  ``_get_norm_groups``
                                              ``complete_grad_norm_...``
clipping, global   ``clip_fp32_gradients``    DeepSpeed's                           DeepSpeed's
clipping per role  in place, ``before_step``  ``unscale_and_clip_grads``            ``unscale_and_clip_grads``
skipped update     ``step`` of the            ``step``                              ``step``
                   torch optimizer
update by one      ``before_step``            ``fused_update``                      ``fused_update``
kernel
=================  =========================  ====================================  =================================

DeepSpeed computes the norm of each buffer on the way to the global one, reduced over the ranks, so the norms by role
cost nothing: they are recorded as they pass. With a threshold per role each buffer is unscaled and clipped by
DeepSpeed's own code, given its role's norm and threshold in place of the global ones. Stage 0 shards nothing: the
parameters are their own masters, and their gradients are complete before the step and are clipped there.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megadit.engine.clipping import ClipPlan
from megadit.engine.deepspeed.fused_update import FusedUpdate3, FusedUpdate12
from megadit.engine.deepspeed.guard import LossScaleExhausted, UpdateGuard
from megadit.engine.deepspeed.norms import RoleNorms
from megadit.engine.deepspeed.patches import MethodPatches
from megadit.mup.spec import Role
from megadit.parallel.tensor import is_shard
from megadit_kernels.adamw import FusedAdamW


class MasterRange(NamedTuple):
    """Elements [start, stop) of a flattened parameter, which lie in the buffer ``flat`` from ``offset`` on."""

    parameter: nn.Parameter
    start: int
    stop: int
    flat: Tensor
    offset: int


class ZeroStage(MethodPatches, ABC):
    """A DeepSpeed engine at one ZeRO stage: its float32 masters, and the patches of its step.

    A patch is a method of this class, put in the place of DeepSpeed's method of the same name by ``_replace``.
    """

    sharded = True  # whether ``engine.optimizer`` is DeepSpeed's ZeRO optimizer around torch's
    may_pad_groups = False  # whether a parameter may be the padding of an optimizer group without members

    def __init__(self, engine: Any, plan: ClipPlan) -> None:
        super().__init__()
        self.engine, self.plan, self.zero = engine, plan, engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer if self.sharded else self.zero
        on_cpu = any(getattr(self.zero, name, False) for name in ("cpu_offload", "offload_optimizer"))
        self.guard = UpdateGuard(engine, self.optimizer, on_cpu=on_cpu, deepspeed_reports=self.sharded)
        self.norms = RoleNorms(plan, self.guard)
        self.patch()

    @abstractmethod
    def patch(self) -> None:
        """Let ``norms`` and ``guard`` see the norms of a step, and skip the update where ``guard`` says so."""

    @abstractmethod
    def master_ranges(self) -> Iterator[MasterRange]:
        """Which elements of which parameters this rank's masters are, in a fixed order."""

    @abstractmethod
    def publish_masters(self) -> None:
        """Copy the masters into the weights that the model computes with (collective)."""

    def before_step(self, want_norms: bool) -> None:
        """Between the last backward pass and the step. ``want_norms``: the norms by role are read after it."""
        self.norms.clear()
        self.guard.begin()

    def global_norm(self) -> Any:
        """Norm of the last step's gradients over all roles, in DeepSpeed's terms: invalid where not finite."""
        return self.engine.get_global_grad_norm()


class ZeroStage0(ZeroStage):
    """Nothing is sharded, and gradients are averaged in place before the step (float32 training only).

    Patched: ``engine.clip_fp32_gradients``, which drops the norm by which it clips; and the optimizer's ``step`` where
    the flag of ``guard`` is not read by its kernel, since at this stage DeepSpeed never asks whether norms are finite.
    """

    sharded = False

    def patch(self) -> None:
        if self.guard.decided_by == "host":
            # Nothing may wrap the replaced step: torch's LRScheduler would rebind its ``__func__`` to the optimizer.
            self._replace(self.optimizer, "step")
        if self.engine.gradient_clipping() > 0:
            self._replace(self.engine, "clip_fp32_gradients")

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's, unless a gradient is not finite."""
        return None if self.guard.found_inf else self.deepspeed_methods.step(*args, **kwargs)

    def clip_fp32_gradients(self) -> None:
        """DeepSpeed's, whose norm ``guard`` is given; the fused kernel clips, as ``before_step`` has told it."""
        from deepspeed.runtime.engine import clip_grad_norm_

        if isinstance(self.optimizer, FusedAdamW):
            return
        engine = self.engine
        norm = clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        self.guard.record_total_norm(norm)

    def master_ranges(self) -> Iterator[MasterRange]:
        """All parameters, the same on every data-parallel rank."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                yield MasterRange(p, 0, p.numel(), p, 0)

    def publish_masters(self) -> None:
        """Nothing to do: the model computes with the masters."""

    def before_step(self, want_norms: bool) -> None:
        """Take the norms by role where they are read or clipped by, and clip by them.

        Under global clipping ``clip_fp32_gradients`` takes the one norm that ``guard`` needs, unless the fused kernel
        is to clip by it.
        """
        super().before_step(want_norms)
        limits, fused = self.plan.limits, isinstance(self.optimizer, FusedAdamW)
        if self.engine.gradient_clipping() > 0 and not (want_norms or limits or fused):
            return
        grads: dict[Role, list[Tensor]] = {}
        for role, group in zip(self.plan.roles, self.optimizer.param_groups, strict=True):
            grads.setdefault(role, []).extend(p.grad for p in group["params"] if p.grad is not None)
        if self.engine.mpu is None:
            norms = {role: torch.nn.utils.get_total_norm(tensors) for role, tensors in grads.items() if tensors}
        else:
            norms = self._tensor_parallel_norms()
        self.norms.record(norms)
        if fused:
            self._clip_in_kernel(norms)
            return
        for role, norm in norms.items():
            if limits and role in limits:
                torch._foreach_mul_(grads[role], _clip_factor(norm, limits[role]))

    def _clip_in_kernel(self, norms: dict[Role, Tensor]) -> None:
        """Hand each role's factor to the kernel, or that of all under global clipping."""
        limits, global_limit = self.plan.limits or {}, self.engine.gradient_clipping()
        factors = {role: _clip_factor(norm, limits[role]) for role, norm in norms.items() if role in limits}
        if global_limit > 0 and norms:
            total = torch.stack(list(norms.values())).square().sum().sqrt()
            factors = dict.fromkeys(norms, _clip_factor(total, global_limit))
        assert isinstance(self.optimizer, FusedAdamW)
        for role, group in zip(self.plan.roles, self.optimizer.param_groups, strict=True):
            for p in group["params"]:
                self.optimizer.prepare(p, scale=factors.get(role))

    def _tensor_parallel_norms(self) -> dict[Role, Tensor]:
        """Shards count on every tensor-parallel rank, replicated parameters on the first."""
        roles = sorted(set(self.plan.roles))
        mpu = self.engine.mpu
        squares = torch.zeros(len(roles), dtype=torch.float64, device=self.engine.device)
        for role, group in zip(self.plan.roles, self.optimizer.param_groups, strict=True):
            for p in group["params"]:
                if p.grad is not None and (is_shard(p) or mpu.get_model_parallel_rank() == 0):
                    squares[roles.index(role)] += p.grad.double().square().sum()
        torch.distributed.all_reduce(squares, group=mpu.get_model_parallel_group())
        return dict(zip(roles, squares.sqrt().float().unbind(), strict=True))

    def global_norm(self) -> float:
        """Of the norms by role that ``before_step`` took: DeepSpeed reports none."""
        return self.norms.total()


def _clip_factor(norm: Tensor, limit: float) -> Tensor:
    return 1.0 / ((norm + 1e-6) / limit).clamp(min=1.0)


class ShardedStage(ZeroStage):
    """What stages 1 to 3 have in common.

    Patched: ``step`` where the optimizer's kernel reads the flag of ``guard``, so that the host need not wait for
    DeepSpeed's question whether the norm is finite; ``unscale_and_clip_grads`` where each role has a threshold; and
    what ``fused_update`` names, where the optimizer's kernel updates in one pass.
    """

    fused_update: type[FusedUpdate12 | FusedUpdate3]

    def patch(self) -> None:
        if isinstance(self.optimizer, FusedAdamW):  # first, so that the methods below call its
            self.fused_update(self.zero, self.optimizer)
        if self.guard.decided_by == "device":
            self.zero.check_grad_overflow = False
            self._replace(self.zero, "step")
        elif self.guard.decided_by == "host":
            self.zero.check_grad_overflow = True  # stage 3 does not read it: it always checks
        if self.plan.limits is not None:
            self._replace(self.zero, "unscale_and_clip_grads")

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, which finds every norm valid."""
        module: Any = sys.modules[type(self.zero).__module__]
        is_invalid_grad_norm = module.is_invalid_grad_norm
        module.is_invalid_grad_norm = lambda _norm: False
        try:
            return self.deepspeed_methods.step(*args, **kwargs)
        finally:
            module.is_invalid_grad_norm = is_invalid_grad_norm

    @abstractmethod
    def role_of_buffer(self, buffer: Any) -> Role:
        """The role of a buffer as ``unscale_and_clip_grads`` is given it."""

    def unscale_and_clip_grads(self, buffer: Any, norm: Tensor) -> None:
        """DeepSpeed's, by the norm and threshold of the buffer's role; without a threshold it only unscales."""
        assert self.plan.limits is not None
        role = self.role_of_buffer(buffer)
        limit = self.plan.limits.get(role)
        global_limit, self.zero.clip_grad = self.zero.clip_grad, 0.0 if limit is None else limit
        try:
            self.deepspeed_methods.unscale_and_clip_grads(buffer, norm if limit is None else self.norms.of(role))
        finally:
            self.zero.clip_grad = global_limit


class ZeroStage12(ShardedStage):
    """Each optimizer group is one flat buffer, of which a rank owns a range.

    Patched beside the common ones: ``scaled_global_norm`` and the two methods by which it takes the norm of a group.
    """

    may_pad_groups = True  # of pipelines, which run at stage 1
    fused_update = FusedUpdate12

    def patch(self) -> None:
        super().patch()
        self._group_norms: list[Tensor] = []
        # With the state on the CPU the last is called in place of the second.
        names = ("scaled_global_norm", "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")
        self._replace(self.zero, *names)

    def scaled_global_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """DeepSpeed's; the norms of the groups, taken on the way, become those of the roles."""
        self._group_norms.clear()
        norm: Tensor = self.deepspeed_methods.scaled_global_norm(*args, **kwargs)
        self.norms.record_buffers(self._group_norms, self.plan.roles, float(self.zero.loss_scale))
        return norm

    def get_grad_norm_direct(self, *args: Any, **kwargs: Any) -> Tensor:
        """DeepSpeed's, recorded."""
        self._group_norms.append(self.deepspeed_methods.get_grad_norm_direct(*args, **kwargs))
        return self._group_norms[-1]

    def complete_grad_norm_calculation_for_cpu_offload(self, *args: Any, **kwargs: Any) -> Tensor:
        """DeepSpeed's, recorded."""
        self._group_norms.append(self.deepspeed_methods.complete_grad_norm_calculation_for_cpu_offload(*args, **kwargs))
        return self._group_norms[-1]

    def role_of_buffer(self, buffer: list[Tensor]) -> Role:
        """``buffer``: the gradient of one group's masters, in a list."""
        masters = self.zero.single_partition_of_fp32_groups
        return self.plan.roles[next(g for g, master in enumerate(masters) if master.grad is buffer[0])]

    def master_ranges(self) -> Iterator[MasterRange]:
        """The parameters, whole or in part, that lie in the rank's range of each group.

        Not by DeepSpeed's own map, ``_hp_mapping``: with ``round_robin_gradients`` it names the wrong parameters, since
        it counts them in the order of the group and not of the buffer.
        """
        zero = self.zero
        for g, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin = torch.distributed.get_rank(zero.real_dp_process_group[g]) * flat.numel()
            for p, first in zip(zero.round_robin_bit16_groups[g], zero.round_robin_bit16_offsets[g], strict=True):
                low, high = max(first, begin), min(first + p.numel(), begin + flat.numel())
                if low < high:
                    yield MasterRange(p, low - first, high - first, flat, low - begin)

    def publish_masters(self) -> None:
        """By DeepSpeed's own all-gather of the weights."""
        self.zero.update_lp_params()


class ZeroStage3(ShardedStage):
    """Weights are sharded, too: a rank owns an equal share of every parameter, in a flat buffer per sub group.

    Patched beside the common ones: ``_get_norm_groups``, which takes the norms of all sub groups.
    """

    fused_update = FusedUpdate3

    def patch(self) -> None:
        super().patch()
        group_of, count = self.zero.sub_group_to_group_id, len(self.zero.fp16_groups)
        self._sub_group_roles = [self.plan.roles[group_of[sub_group]] for sub_group in range(count)]
        self._replace(self.zero, "_get_norm_groups")

    def _get_norm_groups(self) -> list[Tensor]:
        norms: list[Tensor] = self.deepspeed_methods._get_norm_groups()
        self.norms.record_buffers(norms, self._sub_group_roles, float(self.zero.loss_scale))
        return norms

    def role_of_buffer(self, buffer: int) -> Role:
        """``buffer``: the number of a sub group."""
        return self._sub_group_roles[buffer]

    def master_ranges(self) -> Iterator[MasterRange]:
        """The rank's share of every parameter; the last ranks' shares are padded beyond the parameter's end."""
        zero = self.zero
        rank = torch.distributed.get_rank(zero.dp_process_group)
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in params:
                share = p.partition_numel()
                start = min(rank * share, p.ds_numel)
                stop = min(start + share, p.ds_numel)
                if stop > start:
                    yield MasterRange(p, start, stop, flat, offset)
                offset += share

    def publish_masters(self) -> None:
        """Into the rank's shares of the weights; copies that are gathered now are dropped as stale.

        Small parameters stay gathered, and after a forward pass without a backward pass all do.
        """
        for sub_group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        gathered = [p for group in self.zero.fp16_groups for p in group if p.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)


ZERO_STAGES: tuple[type[ZeroStage], ...] = (ZeroStage0, ZeroStage12, ZeroStage12, ZeroStage3)  # by number


class DelayedScaleGrowth:
    """Lets a dynamic loss scale (fp16) grow after the update instead of within it.

    DeepSpeed doubles the scale between the norm and the unscaling, so that once every ``loss_scale_window`` steps the
    gradients are divided by twice what they were multiplied by. Patched: ``_update_scale`` and ``step`` of the ZeRO
    optimizer. A step raises LossScaleExhausted where gradients overflow at the smallest scale.
    """

    def __init__(self, zero: Any) -> None:
        self._zero, self._growths = zero, 0  # growths that the step under way has put off
        self._original_step, self._original_update_scale = zero.step, zero._update_scale
        zero.step, zero._update_scale = self.step, self._update_scale

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, and then the growth of the scale."""
        self._growths = 0
        result = self._original_step(*args, **kwargs)
        for _ in range(self._growths):
            self._original_update_scale(False)
        return result

    def _update_scale(self, has_overflow: bool = False) -> None:
        if not has_overflow:
            self._growths += 1
            return
        try:
            self._original_update_scale(True)
        except Exception as error:  # DeepSpeed has no type of its own for it
            raise LossScaleExhausted(float(self._zero.loss_scale)) from error
