"""Tensors that are known by shape and type and read only when their values are needed, so that files can stream.

What is done with a deferred tensor (``chunk``, ``cat``, ``to``, …) is noted and done when the result is needed, so code
that maps whole state dicts needs memory for one tensor at a time. Nothing is kept: values that are needed twice are
read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class DeferredTensor(Tensor):
    """A CPU tensor without values; ``loaded`` gives them. Operations that need the values at once load them."""

    _load: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, meta: Tensor, load: Callable[[], Tensor]) -> DeferredTensor:
        """``meta`` has the shape, strides and type of what ``load`` returns."""
        wrapper: DeferredTensor = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=torch.device("cpu")
        )
        wrapper._load = load
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredTensor({list(self.shape)}, {self.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array, read now."""
        return loaded(self).numpy(force=force)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the operation, with the shapes that torch gives its results; do it at once if it gives no tensors."""
        operands = (tuple(args), dict(kwargs or {}))

        def run() -> Any:
            values, options = tree_map(loaded, operands)
            return function(*values, **options)

        returned = [str(each.type) for each in function._schema.returns]
        if function._schema.is_mutable or not all(kind in ("Tensor", "List[Tensor]") for kind in returned):
            return run()
        shapes, options = tree_map(_as_meta, operands)
        if "device" in options:
            options["device"] = torch.device("meta")
        metas = function(*shapes, **options)
        if isinstance(metas, Tensor):
            return cls(metas, run)
        return type(metas)(cls(meta, _at(run, number)) for number, meta in enumerate(metas))


def deferred(shape: Sequence[int], dtype: torch.dtype, load: Callable[[], Tensor]) -> Tensor:
    """A tensor whose values ``load`` reads: contiguous, of this shape and type. It may be called any number of times.

    Raises:
        RuntimeError: torch has no tensors of that shape.
    """
    return DeferredTensor(torch.empty(tuple(shape), dtype=dtype, device="meta"), load)


def loaded(value: Any) -> Any:
    """A tensor with its values in memory; whatever is no deferred tensor is returned as it is."""
    return value._load() if isinstance(value, DeferredTensor) else value


def _as_meta(value: Any) -> Any:
    if isinstance(value, DeferredTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _at(run: Callable[[], Any], number: int) -> Callable[[], Tensor]:
    return lambda: run()[number]
