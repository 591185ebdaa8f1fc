"""Triton's interpreter for tests: rounded as a GPU rounds, with guards around operands, counting the bytes that move.

``TRITON_INTERPRET=1`` must be set before triton is imported (tests/conftest.py); it runs a kernel program by program in
numpy. It truncates float32 to bfloat16 where a GPU rounds to the nearest, which ``install`` repairs; in Triton 3.6 it
also takes the bound of a loop in a way that numpy 2.4 refuses.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.scripts import import_script

GUARD = 4096  # elements before and behind
SENTINEL = 12288.0  # exact in bfloat16


def need_interpreter() -> None:
    """Skip loudly where Triton is missing; repair the interpreter where it is there."""
    triton = pytest.importorskip("triton", reason="triton is not installed: `make test` installs it beside a CPU torch")
    assert triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET=1 was set"
    install()


def install() -> None:
    """Round to the nearest bfloat16, ties to even; take loop bounds as numpy 2.4 does. Twice changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder.cast_impl, "rounds", False):
        return
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def narrows(source: Any, target: Any) -> bool:
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def rounded(source: Any) -> Any:
        data = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(data, tl.bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        return rounded(source) if narrows(source, target) else cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        return rounded(source) if narrows(source, target) else convert(self, source, target, mode)

    cast_impl.rounds = True  # type: ignore[attr-defined]
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def faulty(kernels: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """A copy of a module of kernels, made in ``folder``, that says ``wrong`` where this one says ``right``, once."""
    source = Path(str(kernels.__file__)).read_text(encoding="utf-8")
    assert source.count(right) == 1, "the kernel says it otherwise now; adapt the fault"
    path = folder / "faulty.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    return import_script(path)


class Arena:
    """Operands between guards: what a kernel reads beside them is NaN, and what it writes there is noticed."""

    def __init__(self) -> None:
        self._outputs: list[tuple[str, Tensor, int]] = []

    def operand(self, value: Tensor) -> Tensor:
        """A contiguous copy of ``value`` between NaN."""
        buffer = torch.full((value.numel() + 2 * GUARD,), float("nan"), dtype=value.dtype)
        inside = buffer[GUARD : GUARD + value.numel()].view(value.shape)
        return inside.copy_(value)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype, name: str = "output") -> Tensor:
        """Memory to write to, NaN in itself, between sentinels."""
        size = int(np.prod(shape))
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype)
        self._outputs.append((name, buffer, size))
        inside = buffer[GUARD : GUARD + size].view(shape)
        return inside.fill_(float("nan")) if dtype.is_floating_point else inside

    @contextmanager
    def allocating(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Inside, ``new_empty`` of any tensor gives such memory, so that launchers write between sentinels."""

        def new_empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            flat = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.output(tuple(flat), dtype or like.dtype)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", new_empty)
            yield

    def check(self) -> None:
        """Raise AssertionError if anything was written outside an output."""
        for name, buffer, size in self._outputs:
            guards = torch.cat([buffer[:GUARD], buffer[GUARD + size :]])
            written = int((guards != SENTINEL).sum())
            assert not written, f"{name}: {written} elements were written outside of it"


@dataclass
class Launch:
    """Bytes of one kernel launch. Unique: each address once; requested: each active lane of each access."""

    name: str
    programs: int = 0
    unique: Counter[str] = field(default_factory=Counter)
    requested: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        """Read and written, each address once."""
        return self.unique["load"] + self.unique["store"]


@contextmanager
def releasing() -> Iterator[None]:
    """Inside, a launch leaves no reference to its operands behind: those of the interpreter form cycles."""
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        result = call(self, *arguments, **options)
        del arguments, options
        gc.collect()
        return result

    gc.collect()
    gc.freeze()  # so that only what has been made since is looked at
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
            yield
    finally:
        gc.unfreeze()


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches that happen inside, with the bytes that their active lanes load and store."""
    from triton.runtime import interpreter

    launches: list[Launch] = []
    addresses: dict[str, list[Any]] = {}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        active = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[
            np.broadcast_to(mask.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape)).astype(bool)
        ]
        launches[-1].requested[kind] += active.size * size
        addresses.setdefault(f"{kind} {size}", []).append(np.unique(active))

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        grid = self.grid(options) if callable(self.grid) else self.grid
        launches.append(Launch(self.fn.__name__, int(np.prod(grid))))
        addresses.clear()
        result = call(self, *arguments, **options)
        for key, arrays in addresses.items():
            kind, size = key.split()
            launches[-1].unique[kind] += len(np.unique(np.concatenate(arrays))) * int(size)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(executor, "__call__", launch)
        yield launches
