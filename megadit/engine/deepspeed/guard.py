"""Skips the updates whose gradients are not finite, as far as possible without making the host wait.

DeepSpeed 0.19 checks at every step of ZeRO whether the norm is finite, and the host waits for the answer; at stage 0 it
does not check at all. torch's fused AdamW reads a flag on the device instead (``found_inf``): where it is 1 the kernel
leaves weights, moments and step counter as they are. With it DeepSpeed's check is switched off (``zero_stages``), the
flag is set from the norms as they are computed, and the host reads it while the next step runs. The norms are already
reduced, so that all ranks have the same flag without a further collective.

With another optimizer, or one whose state is on the CPU, the host checks at every step, as DeepSpeed does. fp16 keeps
DeepSpeed's loss scaler, for which an overflow is a normal event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """Whether the update of one step was skipped, on its way from the device to the host.

    flags: bool (n,), 1 for a norm that was not finite, of ``roles`` or, where these are empty, of all roles together.
    event: CUDA's, after which ``flags`` may be read.  masked: the host knows without them that it was skipped.
    """

    roles: tuple[Role, ...] = ()
    flags: Tensor | None = None
    event: Any = None
    masked: bool = False

    def skipped(self) -> bool:
        """Whether the update was skipped (waits until the device has finished the step)."""
        return self.masked or any(self._values())

    def nonfinite_roles(self) -> tuple[Role, ...]:
        """Roles whose gradients were not finite; empty where only the norm over all roles is known."""
        return tuple(role for role, flag in zip(self.roles, self._values(), strict=False) if flag)

    def _values(self) -> list[bool]:
        if self.event is not None:
            self.event.synchronize()
        return [] if self.flags is None else self.flags.tolist()


class UpdateGuard:
    """Decides by their norms whether gradients are finite, and whether their update is applied.

    optimizer: torch's, within ``engine``.  on_cpu: its state is on the CPU.  deepspeed_reports: DeepSpeed tells the
    host of an update that it skipped (``engine.was_step_applied``).
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, *, on_cpu: bool, deepspeed_reports: bool) -> None:
        self._engine, self._deepspeed_reports = engine, deepspeed_reports
        self.found_inf = torch.zeros((), dtype=torch.float32, device=engine.device)  # 1: the update is skipped
        self._roles: tuple[Role, ...] = ()
        self._flags: Tensor | None = None
        fused = isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))
        self.decided_by: Literal["loss scaler", "device", "host"] = (
            "loss scaler" if engine.fp16_enabled() else "device" if fused and not on_cpu else "host"
        )
        if self.decided_by == "device":
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    @property
    def applied(self) -> Tensor | None:
        """() float32, 1 where the last update was applied and 0 where not; None where the host knows it."""
        return None if self._deepspeed_reports and self.decided_by != "device" else 1 - self.found_inf

    def begin(self) -> None:
        """Before the update of a step."""
        self._roles, self._flags = (), None

    def record_norms(self, norms: Mapping[Role, Tensor]) -> None:
        """The reduced norms, each (), before the update. DeepSpeed gives -1 for one that is not finite.

        One whose square is not finite counts too: Adam's second moment would not be.
        """
        if norms:
            self._record(tuple(norms.values()))
            self._roles = tuple(norms)

    def record_total_norm(self, norm: Tensor) -> None:
        """The reduced norm over all roles, (), for a step of which the norms by role are not taken."""
        if self._flags is None:
            self._record((norm,))

    def _record(self, norms: Sequence[Tensor]) -> None:
        stacked = torch.stack([norm.detach().to(self.found_inf.device, torch.float32).reshape(()) for norm in norms])
        self._flags = ~stacked.square().isfinite() | (stacked < 0)
        self.found_inf.copy_(self._flags.any())

    def update_status(self) -> UpdateStatus:
        """Of the update that was made last. Nothing waits."""
        if self.decided_by == "loss scaler":
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
