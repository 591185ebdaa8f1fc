"""A part of a model: some consecutive stages, as one rank of a pipeline holds and runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megadit.config.schema.model import ModelConfig
from megadit.models.build import build_model
from megadit.models.stages import Carrier, StagedModel
from megadit.mup.init import init_parameters
from megadit.parallel.recompute import run_block
from megadit.parallel.tensor import TensorLayout, mark_shards


class ModelChunk(nn.Module):
    """Stages [low, high) of ``model``, of which everything else is taken out: ``forward(wire) -> wire``.

    The parameters that are left keep their canonical names in ``model``. The wire is the carrier between two stages
    and, where ``project`` is set and block ``model.repa_block`` lies behind, the projected tokens in front of it. The
    last chunk puts out the model's output, or with ``project`` (output, projected). ``blocks``: how many it has.
    """

    def __init__(self, model: StagedModel, low: int, high: int) -> None:
        super().__init__()
        stages = model.stages()
        blocks = [sum(stage.is_block for stage in stages[:place]) for place in range(len(stages) + 1)]
        self.is_first, self.is_last = low == 0, high == len(stages)
        self.project = False
        self.blocks = blocks[high] - blocks[low]
        self._blocks_before = blocks[low]
        self._stages = tuple(stages[low:high])  # a tuple is not registered: the parameters are the model's
        repa = model.repa if blocks[low] < model.repa_block <= blocks[high] else None
        _take_out(model, {id(m) for part in (*self._stages, repa) if part is not None for m in part.modules()})
        self.model = model
        self.padding = nn.ParameterList()

    def pad(self) -> nn.Parameter:
        """A parameter of two zeros, without a gradient, for an optimizer group that has no member here.

        DeepSpeed makes one collective per group over all stages, and waits for ever for a stage that lacks one.
        """
        self.padding.append(nn.Parameter(torch.zeros(2)))
        return self.padding[-1]

    def forward(self, wire: Carrier | Tensor) -> Carrier | Tensor:
        """Run the stages, the blocks recomputed as ``model.recompute`` says."""
        carrier = (wire,) if isinstance(wire, Tensor) else wire
        blocks, behind = self._blocks_before, self.model.repa_block
        rider: Carrier = ()
        if self.project and blocks >= behind:
            rider, carrier = carrier[:1], carrier[1:]
        for stage in self._stages:
            carrier = run_block(stage, carrier, self.model.recompute if stage.is_block else "none")
            blocks += stage.is_block
            if self.project and stage.is_block and blocks == behind:
                rider = (self.model.projected(carrier[0]),)
        if not self.is_last:
            return (*rider, *carrier)
        return (carrier[0], *rider) if rider else carrier[0]


def _take_out(module: nn.Module, kept: set[int]) -> None:
    """Replace every submodule that is neither kept nor holds one that is by an empty one."""
    for name, child in list(module.named_children()):
        if id(child) in kept:
            continue
        if any(id(inner) in kept for inner in child.modules()):
            _take_out(child, kept)
        else:
            module._modules[name] = nn.Identity()


def build_chunk(
    config: ModelConfig,
    cuts: Sequence[int],
    place: int,
    layout: TensorLayout | None = None,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> ModelChunk:
    """Build chunk ``place`` of a model that is cut at ``cuts``; only its own parameters are made and drawn."""
    model = build_model(config, layout, device="meta")
    chunk = ModelChunk(model, cuts[place], cuts[place + 1])
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        for module in model.modules():  # the parameters are new ones
            mark_shards(module)
        init_parameters(model, seed)
    return chunk
