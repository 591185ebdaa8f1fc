"""Which fused kernels a plan counts: their activations are counted as all others, by running the model with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from megadit.config.schema.kernels import KernelConfig
from megadit.errors import UserError
from megadit_kernels import OPS_OF_KEY


@contextmanager
def planned_kernels(config: KernelConfig, device: str) -> Iterator[tuple[str, ...]]:
    """Inside, layers on the meta device run what ``config`` selects on ``device`` (cuda or cpu), and so save what it
    saves; what a library would run (apex, flash-attn) counts as torch's. Yields the keys whose kernels are fused.

    Fused kernels give the shapes of their results there without a GPU, but not without Triton.

    Raises:
        UserError: a kernel is fused, and Triton is not installed.
    """
    before = {op: op.choice for ops in OPS_OF_KEY.values() for op in ops}
    fused = []
    try:
        for key, ops in OPS_OF_KEY.items():
            choice = getattr(config, key)
            for op in ops:
                op.select("torch" if choice == "reference" else choice)
                name = op.backend_on(device)
                op.select(name if name == "fused" else op.torchs_name)  # libraries have no meta kernels
            if ops[0].choice == "fused":
                fused.append(key)
        if fused and find_spec("triton") is None:
            raise UserError(
                f"kernels.{fused[0]}: fused is planned by Triton's launchers, and triton is not installed; install it, "
                f"or plan with kernels.{fused[0]}=reference"
            )
        yield tuple(fused)
    finally:
        for op, choice in before.items():
            op.select(choice)
