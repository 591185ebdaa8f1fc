"""A fused operation: one name, a plain reference, and the implementations among which a call is dispatched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec

import torch
from torch import Tensor

from megadit_kernels import backends

P = ParamSpec("P")
Function = Callable[Concatenate[Tensor, P], Tensor]


@dataclass(frozen=True)
class Implementation(Generic[P]):
    """``function`` for tensors on ``device`` (a type such as cuda; None: any), where ``works()`` is true."""

    function: Function[P]
    device: str | None
    works: Callable[[], bool]


class Op(Generic[P]):
    """Made by decorating the reference, which says in plain torch what the operation computes.

    A call runs, by the device of its first operand, the implementation that was added last of those that work there,
    and the reference where none does. Like the reference an implementation is differentiable; operands of an autograd
    function of its own it takes through ``for_autocast``.
    """

    def __init__(self, reference: Function[P]) -> None:
        self.name, self.reference = reference.__name__, reference
        functools.update_wrapper(self, reference)
        self._implementations: dict[str, Implementation[P]] = {}
        self._chosen: dict[str, Function[P]] = {}

    def implementation(
        self, backend: str, *, device: str | None = "cuda", works: Callable[[], bool] | None = None
    ) -> Callable[[Function[P]], Function[P]]:
        """Decorator that adds an implementation, called ``backend``.

        ``works``: whether this machine can run it, asked before its first use and not when it is added; by default what
        ``megadit_kernels.backends`` finds of a backend of that name.

        Raises:
            ValueError: there is one of that name, or nothing tells whether it works.
        """
        if backend in self._implementations or backend == "reference":
            raise ValueError(f"{self.name}: there is an implementation {backend!r} already; choose another name")
        if works is None and backend not in backends.backend_names():
            raise ValueError(
                f"{self.name}: {backend!r} is none of {', '.join(backends.backend_names())}; say by works= when it runs"
            )

        def add(function: Function[P]) -> Function[P]:
            found = works or functools.partial(backends.works, backend)
            self._implementations[backend] = Implementation(function, device, found)
            self._chosen.clear()
            return function

        return add

    def discard(self, backend: str) -> None:
        """Take back an implementation."""
        self._implementations.pop(backend, None)
        self._chosen.clear()

    def backend_on(self, device: str) -> str:
        """The name of what runs on a device of this type: ``reference`` where no implementation works there."""
        for name, added in reversed(self._implementations.items()):
            if added.device in (None, device) and added.works():
                return name
        return "reference"

    def __call__(self, x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = x.device.type
        function = self._chosen.get(device)
        if function is None:
            name = self.backend_on(device)
            function = self.reference if name == "reference" else self._implementations[name].function
            self._chosen[device] = function
        return function(x, *args, **kwargs)


def for_autocast(*operands: Tensor | None) -> list[Tensor | None]:
    """Operands of an autograd function in the dtype of a surrounding autocast, which reaches torch's own ops only."""
    device = next(part.device.type for part in operands if part is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(operands)
    dtype = torch.get_autocast_dtype(device)
    return [None if part is None else part.to(dtype) for part in operands]
