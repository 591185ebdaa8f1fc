"""A part of a model: some consecutive stages, as one rank of a pipeline holds and runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megadit.config.schema.model import ModelConfig
from megadit.models.build import build_model
from megadit.models.stages import Carrier, StagedModel
from megadit.mup.init import init_parameters
from megadit.parallel.tensor import TensorLayout, mark_shards


class ModelChunk(nn.Module):
    """Stages [low, high) of ``model``, of which everything else is taken out: ``forward(stage_io) -> stage_io``.

    The parameters that are left keep their canonical names in ``model``. What goes in and out is the packed state
    between two stages and, where ``project`` is set and block ``model.repa_block`` lies behind, the REPA projection in
    front of it. The last chunk puts out the model's output, or with ``project`` (output, projection). ``blocks``: how
    many it has.
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

    def forward(self, stage_io: Carrier | Tensor) -> Carrier | Tensor:
        """Run the stages, the blocks recomputed as ``model.recompute`` says."""
        state = (stage_io,) if isinstance(stage_io, Tensor) else stage_io
        repa_projection: Carrier = ()  # of one tensor, once there is one
        block, repa_block = self._blocks_before, self.model.repa_block if self.project else 0
        if 0 < repa_block <= block:
            repa_projection, state = state[:1], state[1:]
        for stage in self._stages:
            state = stage.recomputed(state, self.model.recompute)
            block += stage.is_block
            if stage.is_block and block == repa_block:
                repa_projection = (self.model.projected(state[0]),)
        if self.is_last:
            return (*state, *repa_projection) if repa_projection else state[0]
        return (*repa_projection, *state)


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
