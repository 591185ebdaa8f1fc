"""Whether torch.compile works on this machine."""

from __future__ import annotations

import os

import torch

from megadit.errors import UserError, one_line


def check_compiler(device: torch.device) -> None:
    """Compile and run a one-line function on ``device``.

    Raises:
        UserError: torch.compile is switched off, or has no working compiler here.
    """
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name) == "1":
            raise UserError(
                f"train.compile: true, but {name}=1 switches torch.compile off; unset it, or set it to false"
            )
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # the many ways in which a tool chain can be missing
        raise UserError(
            f"train.compile: true, but torch.compile does not work here ({one_line(error)}); install a C++ "
            "compiler (and triton for a GPU), or set it to false"
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + 1
