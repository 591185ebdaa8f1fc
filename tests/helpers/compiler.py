"""torch.compile in tests, for which conftest.py switches it off: importing it costs each process a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


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
        graphs = counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
    assert graphs, f"torch.compile compiled nothing (TORCHDYNAMO_DISABLE={os.environ.get('TORCHDYNAMO_DISABLE')})"
