"""The consecutive stages of a model that one pipeline rank holds and runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megadit.config.schema.model import ModelConfig
from megadit.models.build import build_model
from megadit.models.stages import StagedModel, StageIO, compile_blocks
from megadit.mup.init import init_parameters
from megadit.parallel.tensor import TensorLayout, mark_shards


class ModelChunk(nn.Module):
    """Stages [low, high) of ``model``: ``forward(stage_io) -> stage_io``.

    ``model`` is changed: the submodules of other stages are removed, the remaining parameters keep their canonical
    names. ``stage_io`` is the packed state between two stages; where ``project`` is set and block ``model.repa_block``
    has run, the REPA projection (B, T, F) stands before it, as one tensor. The last chunk returns the model's output,
    or with ``project`` (output, projection).

    project: compute and pass on the REPA projection; the engine sets it before a pass.  blocks: number of stages here
    that are blocks.
    """

    def __init__(self, model: StagedModel, low: int, high: int) -> None:
        super().__init__()
        stages = model.stages()
        blocks = [sum(stage.is_block for stage in stages[:cut]) for cut in range(len(stages) + 1)]  # before each
        self.is_first, self.is_last = low == 0, high == len(stages)
        self.project = False
        self.blocks = blocks[high] - blocks[low]
        self._blocks_before = blocks[low]
        self._stages = tuple(stages[low:high])  # a tuple is not registered: the parameters are the model's
        repa = model.repa if blocks[low] < model.repa_block <= blocks[high] else None
        _remove_others(model, {id(m) for part in (*self._stages, repa) if part is not None for m in part.modules()})
        self.model = model
        self.padding = nn.ParameterList()

    def pad(self) -> nn.Parameter:
        """A parameter of two zeros, without a gradient, for an optimizer group that has no parameter in this chunk.

        DeepSpeed runs one collective per group over all stages, which hangs where a stage lacks the group.
        """
        self.padding.append(nn.Parameter(torch.zeros(2)))
        return self.padding[-1]

    def compile_blocks(self, **options: Any) -> None:
        """Compile the chunk's blocks with torch.compile; see ``megadit.models.stages.compile_blocks``."""
        compile_blocks(self._stages, self.model.recompute, **options)

    def forward(self, stage_io: StageIO | Tensor) -> StageIO | Tensor:
        """Run the stages, the blocks recomputed as ``model.recompute`` says."""
        state = (stage_io,) if isinstance(stage_io, Tensor) else stage_io
        repa_projection: StageIO = ()  # one tensor, once block ``repa_block`` has run here or on an earlier rank
        block, repa_block = self._blocks_before, self.model.repa_block if self.project else 0
        if 0 < repa_block <= block:
            repa_projection, state = state[:1], state[1:]
        for stage, following in zip(self._stages, (*self._stages[1:], None), strict=True):
            block += stage.is_block
            is_read = stage.is_block and block == repa_block
            pending = self.model.leaves_pending(stage, following, is_read)
            state = stage.recomputed(state, self.model.recompute, pending)
            if is_read:
                repa_projection = (self.model.project_tokens(state[0]),)
        if self.is_last:
            return (*state, *repa_projection) if repa_projection else state[0]
        return (*repa_projection, *state)


def _remove_others(module: nn.Module, keep: set[int]) -> None:
    """Replace by ``nn.Identity`` every submodule whose id is not in ``keep``, and that contains none whose id is."""
    for name, child in list(module.named_children()):
        if id(child) in keep:
            continue
        if any(id(inner) in keep for inner in child.modules()):
            _remove_others(child, keep)
        else:
            module._modules[name] = nn.Identity()


def build_chunk(
    config: ModelConfig,
    cuts: Sequence[int],
    index: int,
    layout: TensorLayout | None = None,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> ModelChunk:
    """Build chunk ``index``, counted from 0: stages [cuts[index], cuts[index + 1]) of the model.

    Only its own parameters are allocated and initialised, in float32. Their values depend on ``seed`` and the
    parameter's name alone, so they are those of ``build_model``.

    cuts: ascending indices of stages, from 0 to their number; see ``megadit.parallel.topology.balanced_cuts``.
    layout: the tensor-parallel rank whose shards are built; None: layers are not sharded.  device: on ``"meta"``
    nothing is allocated or initialised.

    Raises:
        ValueError: the tensor-parallel size does not divide the model's heads or channels.
    """
    model = build_model(config, layout, device="meta")
    chunk = ModelChunk(model, cuts[index], cuts[index + 1])
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        for module in model.modules():  # the parameters are new ones
            mark_shards(module)
        init_parameters(model, seed)
    return chunk
