"""ZeRO's update by one kernel (``optim.implementation: fused``), a class per ZeRO stage. Written for DeepSpeed 0.19.

Around the optimizer's step DeepSpeed's ZeRO makes four passes of its own over a rank's shard: it joins the gradients of
the parameters into one tensor, converts that to float32, multiplies it by the loss scale's and clipping's factor, and
copies the new masters into the weights. With bf16 these are 24 bytes per parameter beside the step's 28. ``FusedAdamW``
does all of it in its 28 (bf16 gradients; float32: 30). So here the passes are taken out of DeepSpeed's step:

=====================  =====================================  ============================================
pass                   stages 1 and 2                         stage 3
=====================  =====================================  ============================================
joining, conversion    ``_get_preflattened_grad_partition``   ``_prepare_fp32_grad_for_sub_group``
unscaling, clipping    ``unscale_and_clip_grads``             ``unscale_and_clip_grads``
copy to the weights    after ``_optimizer_step``              ``_reassign_or_swap_out_partitioned_parameters``
=====================  =====================================  ============================================

DeepSpeed's own code computes the factor: of a gradient of 1 it makes the factor itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megadit.engine.deepspeed.patches import MethodPatches
from megadit_kernels.adamw import FusedAdamW


class FusedUpdate12(MethodPatches):
    """At ZeRO 1 and 2, where each optimizer group is one flat buffer of masters."""

    def __init__(self, zero: Any, optimizer: FusedAdamW) -> None:
        super().__init__()
        self.zero, self.optimizer = zero, optimizer
        self._gradients: list[Tensor] = []  # of the group that is updated now
        self._factor: Tensor | None = None
        # A gradient of the masters for DeepSpeed to hand around, which takes no memory.
        self._placeholder = torch.zeros((), dtype=torch.float32, device=zero.device)
        names = ("step", "_get_preflattened_grad_partition", "unscale_and_clip_grads", "_optimizer_step")
        self._replace(zero, *names)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's; undoes what ``_optimizer_step`` changes."""
        masters = list(self.zero.single_partition_of_fp32_groups)
        try:
            return self.deepspeed_methods.step(*args, **kwargs)
        finally:
            self.zero.single_partition_of_fp32_groups[:] = masters

    def _get_preflattened_grad_partition(self, group: int) -> Tensor:
        self._gradients = list(self.zero.averaged_gradients[group])
        return self._placeholder.expand(self.zero.single_partition_of_fp32_groups[group].numel())

    def unscale_and_clip_grads(self, buffer: list[Tensor], norm: Tensor) -> None:
        """Take the factor of the group's gradient, ``buffer``, instead of multiplying by it."""
        self._factor = torch.ones_like(self._placeholder)
        self.deepspeed_methods.unscale_and_clip_grads([self._factor], norm)

    def _optimizer_step(self, group: int) -> None:
        masters = self.zero.single_partition_of_fp32_groups
        master = masters[group]
        rank = torch.distributed.get_rank(self.zero.real_dp_process_group[group])
        weights = self.zero.parallel_partitioned_bit16_groups[group][rank]
        self.optimizer.prepare(master, gradients=self._gradients, scale=self._factor, copy=weights)
        self.deepspeed_methods._optimizer_step(group)
        master.grad, self._gradients = None, []
        masters[group] = weights  # which DeepSpeed now copies onto themselves: torch moves nothing


class FusedUpdate3(MethodPatches):
    """At ZeRO 3, where each sub group is one flat buffer of masters."""

    def __init__(self, zero: Any, optimizer: FusedAdamW) -> None:
        super().__init__()
        self.zero, self.optimizer = zero, optimizer
        self._gradients: list[Tensor] = []  # of the sub group that is updated now
        self._factor: Tensor | None = None
        self._copied: int | None = None  # the sub group whose weights the kernel has written
        self._replace(
            zero,
            "_prepare_fp32_grad_for_sub_group",
            "unscale_and_clip_grads",
            "_optimizer_step",
            "_reassign_or_swap_out_partitioned_parameters",
        )

    def _prepare_fp32_grad_for_sub_group(self, sub_group: int) -> None:
        self._gradients = list(self.zero.averaged_gradients[sub_group])
        self.zero.averaged_gradients[sub_group] = None

    def unscale_and_clip_grads(self, sub_group: int, norm: Tensor) -> None:
        """Take the factor of the sub group's gradient instead of multiplying by it."""
        masters = self.zero.fp32_partitioned_groups_flat
        master = masters[sub_group]
        self._factor = torch.ones((), dtype=torch.float32, device=master.device)
        masters[sub_group] = SimpleNamespace(grad=self._factor)
        try:
            self.deepspeed_methods.unscale_and_clip_grads(sub_group, norm)
        finally:
            masters[sub_group] = master

    def _optimizer_step(self, sub_group: int) -> None:
        master = self.zero.fp32_partitioned_groups_flat[sub_group]
        weights = self.zero.fp16_partitioned_groups_flat[sub_group]
        if weights is not None and weights.device != master.device:  # parameters are offloaded
            weights = None
        self.optimizer.prepare(master, gradients=self._gradients, scale=self._factor, copy=weights)
        self.deepspeed_methods._optimizer_step(sub_group)
        self._gradients = []
        self._copied = None if weights is None else sub_group

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group: int) -> None:
        copied, self._copied = self._copied, None
        if copied == sub_group:
            self.zero._unflatten_partitioned_parameters(sub_group)
        else:
            self.deepspeed_methods._reassign_or_swap_out_partitioned_parameters(sub_group)
