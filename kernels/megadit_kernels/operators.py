"""The launchers of a kernel as one differentiable call, in eager mode and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable


class KernelOperator:
    """A call runs ``forward``: in eager mode by an autograd function, under torch.compile by an operator.

    torch.compile keeps an operator whole; its dispatch costs several times as much per call as an autograd function.
    Both launchers give results of the right shapes on the meta device and for fake tensors too (see ``launches``), so
    they are their operators' fakes as well.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., Any],
    ) -> None:
        """``name`` of the operator, ``megadit::NAME``; its backward pass is ``megadit::NAME_backward``.

        ``save(ctx, inputs, output)`` keeps what the backward pass needs. ``gradients(launch, ctx, *grads)`` gives the
        gradient of each argument of ``forward``, by ``launch``: ``backward``, or its operator.
        """
        self.forward = torch.library.custom_op(f"megadit::{name}", forward, mutates_args=())
        self.backward = torch.library.custom_op(f"megadit::{name}_backward", backward, mutates_args=())
        self.forward.register_fake(forward)
        self.backward.register_fake(backward)
        self.forward.register_autograd(lambda ctx, *grads: gradients(self.backward, ctx, *grads), setup_context=save)
        members = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(save),
            "backward": staticmethod(once_differentiable(lambda ctx, *grads: gradients(backward, ctx, *grads))),
        }
        self._eager: Any = type(f"_{name}", (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        return self.forward(*arguments) if torch.compiler.is_compiling() else self._eager.apply(*arguments)


def launches(x: Tensor) -> bool:
    """Whether a kernel has anything to do: not for an empty tensor, nor for one that has a shape and no values."""
    return x.numel() > 0 and x.device.type != "meta" and not isinstance(x, FakeTensor)


def rows_of(x: Tensor) -> Tensor:
    """x (..., n) as rows (k, n) with channels side by side; copied only where they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
