"""Shares of parameters in tests: what of a whole tensor a tensor-parallel rank holds, and layouts of test ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadit.parallel.tensor import TensorLayout
from megadit.slices import Boxes, runs


def share_of(whole: Tensor, boxes: Boxes | None) -> Tensor:
    """The elements of ``whole`` in ``boxes``, flat, in the order of the share; all of it for None."""
    if boxes is None:
        return whole.flatten()
    pieces = sorted(runs(whole.shape, boxes, 0, math.prod(whole.shape)), key=lambda run: run.at)
    return torch.cat([whole.flatten()[run.first : run.first + run.length] for run in pieces])


def this_rank(sequence: bool = False) -> TensorLayout:
    """The layout in which all ranks of a test share every layer."""
    import torch.distributed as dist

    return TensorLayout(dist.get_world_size(), dist.get_rank(), sequence, dist.group.WORLD)
