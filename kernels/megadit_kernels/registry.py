"""``Op``: a fused operation with a reference and implementations, to which calls are dispatched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from megadit_kernels import backends

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """``function`` for tensors on ``device`` (a type such as cuda; None: any), where ``works()`` is true.

    ``automatic``: auto may take it; else it runs where it is selected by its name alone.
    """

    function: Callable[Concatenate[Tensor, P], R]
    device: str | None
    works: Callable[[], bool]
    automatic: bool = True


class Op(Generic[P, R]):
    """Decorator of the reference, which defines the operation in plain torch.

    A call runs the latest added implementation that works on the device of its first operand, or the reference where
    none does. Implementations are differentiable, as the reference is; an autograd function of theirs must take its
    operands through ``for_autocast``.
    """

    def __init__(self, reference: Callable[Concatenate[Tensor, P], R]) -> None:
        functools.update_wrapper(self, reference)
        self.name, self.reference = reference.__name__, reference
        self.choice = "auto"
        self._implementations: dict[str, Implementation[P, R]] = {}
        self._chosen: dict[str, Callable[Concatenate[Tensor, P], R]] = {}

    def implementation(
        self,
        backend: str,
        *,
        device: str | None = "cuda",
        works: Callable[[], bool] | None = None,
        automatic: bool = True,
    ) -> Callable[[Callable[Concatenate[Tensor, P], R]], Callable[Concatenate[Tensor, P], R]]:
        """Decorator that adds the implementation ``backend``.

        ``works``: whether this machine can run it, called before its first use; default: the probe of that name in
        ``megadit_kernels.backends``. ``automatic``: see ``Implementation``.

        Raises:
            ValueError: an implementation of that name exists, or there is neither ``works`` nor a probe.
        """
        if backend in self._implementations or backend == "reference":
            raise ValueError(f"{self.name}: there is an implementation {backend!r} already; choose another name")
        if works is None and backend not in backends.backend_names():
            raise ValueError(
                f"{self.name}: {backend!r} is none of {', '.join(backends.backend_names())}; say by works= when it runs"
            )

        def add(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
            is_working = works or (lambda: backends.works(backend))
            self._implementations[backend] = Implementation(function, device, is_working, automatic)
            self._chosen.clear()
            return function

        return add

    def discard(self, backend: str) -> None:
        """Remove the implementation ``backend``, if there is one."""
        self._implementations.pop(backend, None)
        self._chosen.clear()

    def select(self, choice: str) -> None:
        """``auto``, or the name of the implementation that runs from now on wherever the operands are.

        Raises:
            ValueError: there is none of that name.
        """
        if choice not in ("auto", "reference", *self._implementations):
            names = ", ".join(("auto", "reference", *self._implementations))
            raise ValueError(f"{self.name}: no implementation {choice!r}; choose one of {names}")
        self.choice = choice
        self._chosen.clear()

    def names(self) -> tuple[str, ...]:
        """Of all implementations, the reference first."""
        return ("reference", *self._implementations)

    def by(self, backend: str) -> Callable[Concatenate[Tensor, P], R]:
        """The implementation of that name, or the reference, without dispatch. Raises KeyError for another name."""
        return self.reference if backend == "reference" else self._implementations[backend].function

    def backend_on(self, device: str) -> str:
        """Name of the implementation for this type of device; ``reference`` where none works."""
        if self.choice != "auto":
            return self.choice
        for name, added in reversed(self._implementations.items()):
            if added.automatic and added.device in (None, device) and added.works():
                return name
        return "reference"

    def is_fused(self, x: Tensor) -> bool:
        """Whether a call with this first operand runs another implementation than torch's own kernels."""
        function = self.function_on(x.device.type)
        return function is not self.reference and function is not self.by(self.torchs_name)

    @property
    def torchs_name(self) -> str:
        """Name of the implementation by torch's own kernels: ``torch`` where there is one, else ``reference``."""
        return "torch" if "torch" in self._implementations else "reference"

    def __call__(self, x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        function = self._chosen.get(x.device.type) or self.choose(x.device.type)
        return function(x, *args, **kwargs)

    def function_on(self, device: str) -> Callable[Concatenate[Tensor, P], R]:
        """What a call with operands on this type of device runs."""
        return self._chosen.get(device) or self.choose(device)

    def choose(self, device: str) -> Callable[Concatenate[Tensor, P], R]:
        """What runs on this type of device from now on, which the first call would find out: torch.compile cannot trace
        that inside of activation checkpointing."""
        function = self._chosen[device] = self.by(self.backend_on(device))
        return function


def triton_runs() -> bool:
    """Whether Triton compiles and launches here, found by trying; false in its interpreter, which tests ask for."""
    return backends.works("triton")


def for_autocast(*operands: Tensor | None) -> list[Tensor | None]:
    """Operands of an autograd function, cast as a surrounding autocast casts those of torch's own ops."""
    device = next(operand.device.type for operand in operands if operand is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(operands)
    dtype = torch.get_autocast_dtype(device)
    return [None if operand is None else operand.to(dtype) for operand in operands]
