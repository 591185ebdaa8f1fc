"""torch.compile in tests, for which conftest.py switches it off: importing it costs each process a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WHOLE: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}  # traced and differentiated, run by eager kernels


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch.compile compiles, from an empty cache. Raises AssertionError at the end if nothing was compiled.

    ``TORCHDYNAMO_DISABLE=1`` makes torch.compile return the function that it is given, whatever
    ``torch._dynamo.config.disable`` says, so that a test would compare the eager function with itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        import torch._dynamo
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(disable=False):
            yield
        compiled = graphs()
        torch._dynamo.reset()
    assert compiled, f"torch.compile compiled nothing (TORCHDYNAMO_DISABLE={os.environ.get('TORCHDYNAMO_DISABLE')})"


def graphs() -> int:
    """How many graphs this process has compiled inside ``compiling``."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def import_compiler() -> None:
    """In the process that forks ranks, so that they need not."""
    from torch._dynamo.backends import debugging  # noqa: F401
