"""Which updates may be made, decided on the device. With ``partitions`` the door to DeepSpeed's internals.

DeepSpeed 0.19 asks at every step of ZeRO whether the norm is a finite number, and the host waits for the answer; at
stage 0 it does not ask at all. torch's fused AdamW reads a flag on the device instead (``found_inf``): where it is 1
the kernel leaves weights, moments and step counter as they are. So with it DeepSpeed's questions are not asked, the
flag is set from the norms as they pass, and the host reads it when the next step is under way. The norms are reduced
already, so that all ranks have the same flag without a collective of its own.

With another optimizer, or one whose state is on the CPU, the host asks at every step, as DeepSpeed does. fp16 keeps
DeepSpeed's loss scaler, for which an overflow is a normal event.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadit.mup.spec import Role


class LossScaleExhausted(ArithmeticError):
    """fp16 gradients overflowed at the smallest loss scale, ``scale``."""

    def __init__(self, scale: float) -> None:
        super().__init__(f"gradients overflow at the smallest loss scale, {scale:g}")
        self.scale = scale


@dataclass(frozen=True)
class UpdateStatus:
    """What the device says of one step, on its way to the host. ``roles`` belong to the entries of ``flags``."""

    roles: tuple[Role, ...] = ()
    flags: Tensor | None = None
    event: Any = None
    masked: bool = False  # known without the device

    def skipped(self) -> bool:
        """Whether the update was left out (waits until the device has made the step)."""
        return self.masked or any(self._values())

    def nonfinite_roles(self) -> tuple[Role, ...]:
        """Roles whose gradients were not finite; empty where only the norm over all was taken."""
        return tuple(role for role, flag in zip(self.roles, self._values(), strict=False) if flag)

    def _values(self) -> list[bool]:
        if self.event is not None:
            self.event.synchronize()
        return [] if self.flags is None else self.flags.tolist()


class UpdateGuard:
    """Leaves out the update of a DeepSpeed engine whose gradients are not finite."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._engine, self._stage = engine, stage
        zero = engine.optimizer
        inner = zero if stage == 0 else zero.optimizer
        self._scaled = bool(engine.fp16_enabled())
        self._found = torch.zeros((), dtype=torch.float32, device=engine.device)
        self._roles: tuple[Role, ...] = ()
        self._flags: Tensor | None = None
        on_cpu = any(getattr(zero, name, False) for name in ("cpu_offload", "offload_optimizer"))
        fused = isinstance(inner, torch.optim.AdamW) and bool(inner.defaults.get("fused"))
        self._on_device = fused and not on_cpu and not self._scaled
        if self._scaled:
            return
        if self._on_device:
            inner.found_inf = self._found
            if stage > 0:
                _ask_nothing(zero)
        elif stage == 0:
            inner.step = self._asking(inner.step)
        else:
            zero.check_grad_overflow = True  # which stage 3 does not read: it always asks

    @property
    def applied(self) -> Tensor | None:
        """() float32, 1 where the last update was made and 0 where not; None where DeepSpeed tells the host of it."""
        return 1 - self._found if self._on_device or self._stage == 0 else None

    def begin(self) -> None:
        """Before the update of a step."""
        self._roles, self._flags = (), None

    def see(self, norms: Mapping[Role, Tensor]) -> None:
        """Take the reduced norms, on the way to the update. DeepSpeed says -1 for one that is not finite.

        One whose square is not finite counts too: Adam's second moment would not be.
        """
        if norms:
            self._judge(tuple(norms.values()))
            self._roles = tuple(norms)

    def see_total(self, norm: Tensor) -> None:
        """Take the reduced norm over all roles, where those of the roles were not taken."""
        if self._flags is None:
            self._judge((norm,))

    def _judge(self, norms: Sequence[Tensor]) -> None:
        stacked = torch.stack([norm.detach().to(self._found.device, torch.float32).reshape(()) for norm in norms])
        self._flags = ~stacked.square().isfinite() | (stacked < 0)
        self._found.copy_(self._flags.any())

    def update_status(self) -> UpdateStatus:
        """After the update: what the device will say of it. Nothing waits."""
        if self._scaled:
            return UpdateStatus()
        # None where DeepSpeed found an overflow before it took a norm.
        skipped = not self._engine.was_step_applied()
        if self._flags is None or not self._flags.is_cuda:
            return UpdateStatus(self._roles, self._flags, None, skipped)
        flags = torch.empty(self._flags.shape, dtype=torch.bool, pin_memory=True)
        flags.copy_(self._flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return UpdateStatus(self._roles, flags, event, skipped)

    def _asking(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def asking(*args: Any, **kwargs: Any) -> Any:
            return None if self._found else step(*args, **kwargs)

        return asking


def _ask_nothing(zero: Any) -> None:
    """Let a ZeRO optimizer's step go on to the update without a look at the norm."""
    zero.check_grad_overflow = False
    module, step = sys.modules[type(zero).__module__], zero.step

    def unasked(*args: Any, **kwargs: Any) -> Any:
        plain = module.is_invalid_grad_norm
        module.is_invalid_grad_norm = lambda _norm: False  # type: ignore[attr-defined]
        try:
            return step(*args, **kwargs)
        finally:
            module.is_invalid_grad_norm = plain  # type: ignore[attr-defined]

    zero.step = unasked


def watch_clipping(engine: Any, see_total: Callable[[Tensor], None]) -> None:
    """Show ``see_total`` the norm by which DeepSpeed clips at stage 0, where it keeps none."""
    from deepspeed.runtime.engine import clip_grad_norm_

    def clip_fp32_gradients() -> None:
        see_total(clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu))

    engine.clip_fp32_gradients = clip_fp32_gradients
