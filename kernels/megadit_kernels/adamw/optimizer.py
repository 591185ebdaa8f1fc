"""``FusedAdamW``: torch's AdamW, stepped by the fused kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megadit_kernels.adamw.reference import Shard


@dataclass
class _Operands:
    gradients: list[Tensor] = field(default_factory=list)  # empty: the parameter's own
    scale: Tensor | None = None
    copy: Tensor | None = None


class FusedAdamW(torch.optim.AdamW):
    """AdamW over float32 parameters: one launch per step for all groups that it is given.

    State, groups and the flag ``found_inf`` (() float32, 1: the step changes nothing) are those of
    ``torch.optim.AdamW(fused=True)``, so that either continues where the other stopped. ``prepare`` adds what torch
    has no argument for.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._prepared: dict[Tensor, _Operands] = {}
        self._update: Callable[..., list[Tensor]] | None = None  # made at the first step, which needs Triton

    def prepare(
        self,
        parameter: Tensor,
        *,
        gradients: Sequence[Tensor] = (),
        scale: Tensor | None = None,
        copy: Tensor | None = None,
    ) -> None:
        """Operands of the parameter's next step.

        gradients: in place of ``parameter.grad``: tensors of any precision whose elements, one after the other, belong
        to the first of the parameter's.  scale: () float32, a factor of the gradient.  copy: receives the new values.
        """
        self._prepared[parameter] = _Operands(list(gradients), scale, copy)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient. Returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards: dict[tuple[float, float], list[Shard]] = defaultdict(list)
        states: dict[tuple[float, float], list[dict[str, Any]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                operands = self._prepared.pop(parameter, None) or _Operands()
                gradients = operands.gradients or ([] if parameter.grad is None else [parameter.grad])
                if not gradients:
                    continue
                state = self._state_of(parameter)
                shards[group["betas"]].append(
                    Shard(
                        parameter,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        state["step"],
                        tuple(_in_order(gradient, parameter) for gradient in gradients),
                        float(group["lr"]),
                        group["weight_decay"],
                        group["eps"],
                        operands.scale,
                        operands.copy,
                    )
                )
                states[group["betas"]].append(state)
        for betas, group_shards in shards.items():
            steps = self._updater()(group_shards, betas, getattr(self, "found_inf", None))
            for state, step in zip(states[betas], steps, strict=True):
                state["step"] = step
        return loss

    def _updater(self) -> Callable[..., list[Tensor]]:
        if self._update is None:
            from megadit_kernels.adamw.fused import Updater

            self._update = Updater()
        return self._update

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        if parameter.dtype != torch.float32:
            raise TypeError(f"FusedAdamW updates float32 masters, not {parameter.dtype}")
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _in_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with its elements in memory as those of the parameter are."""
    if gradient.shape == parameter.shape and gradient.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    return gradient if gradient.shape == parameter.shape else gradient.contiguous()
