"""``ApexAdamW``: AdamW by NVIDIA apex's multi-tensor kernel, where apex is installed.

apex's own ``FusedAdam`` counts updates by group, so that under ZeRO-3, which steps every part of a group by itself, its
bias correction would count each part. Here every buffer has its own counter, as with DeepSpeed's FusedAdam, whose
kernel was taken from apex.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_ADAMW_MODE = 1  # decoupled decay; 0 would add it to the gradient
_BIAS_CORRECTION = 1


class ApexAdamW(torch.optim.Optimizer):
    """AdamW over float32 CUDA tensors by ``amp_C.multi_tensor_adam``.

    Raises:
        ImportError: apex, or its compiled module ``amp_C``, is not installed.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier

        self._kernel, self._apply = amp_C.multi_tensor_adam, multi_tensor_applier
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient. Returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_count: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["step"] = 0
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["step"] += 1
                    operands = (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"])
                    by_count[state["step"]].append(operands)
            for count, operands_of in by_count.items():
                self._launch(group, count, operands_of)
        return loss

    def _launch(self, group: dict[str, Any], count: int, operands: list[tuple[Tensor, ...]]) -> None:
        lists = [list(column) for column in zip(*operands, strict=True)]
        never = torch.zeros(1, dtype=torch.int32, device=lists[0][0].device)  # the kernel's flag to do nothing
        beta1, beta2 = group["betas"]
        self._apply(
            self._kernel,
            never,
            lists,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            count,
            _ADAMW_MODE,
            _BIAS_CORRECTION,
            group["weight_decay"],
        )
