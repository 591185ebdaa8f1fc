"""A small family of megadit's layers: every token sees the mean of all tokens, then an MLP. No attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import Conditioning
from megadit.config import ModelConfig
from megadit.models import Stage, StagedModel
from megadit.models.layers import (
    AdaLNReadout,
    LabelEmbedder,
    Mlp,
    PatchEmbedder,
    SinCosPositions,
    TimestepEmbedder,
)
from megadit.models.patches import (
    ConditionedTokens,
    SquareReadoutStage,
    check_square,
    class_labels,
    num_patches,
    patches_per_side,
)
from megadit.models.stages import ModelInputs
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.collectives import shared_block_input
from megadit.parallel.tensor import tensor_layout


class Block(Stage):
    """The condition is SiLU(c)."""

    takes = ConditionedTokens
    is_block = True

    def __init__(self, config: ModelConfig, param: Parametrization, index: int, hidden: Dim) -> None:
        super().__init__()
        self.prefix = f"blocks.{index}."
        self.pool = float(config.options.get("pool", 1.0))
        self.mlp = Mlp(param.width_dim(), hidden, param)

    def run(self, state: ConditionedTokens) -> ConditionedTokens:
        """Tokens plus an MLP of them and of their mean."""
        x = state.tokens
        mixed = x + self.pool * x.mean(1, keepdim=True)
        return ConditionedTokens(x + self.mlp(F.layer_norm(mixed, mixed.shape[-1:])), state.condition)


class Embed(Stage):
    """The condition is carried for the readout, and added to every token."""

    takes = ModelInputs

    def __init__(self, model: Toy) -> None:
        super().__init__()
        self.x_embedder, self.pos_embed = model.x_embedder, model.pos_embed
        self.t_embedder, self.y_embedder = model.t_embedder, model.y_embedder
        self.layout = tensor_layout()

    def run(self, state: ModelInputs) -> ConditionedTokens:
        """c = features of the time + row of the class."""
        c = F.silu(self.t_embedder(state.t) + self.y_embedder(state.labels))
        tokens = self.pos_embed(self.x_embedder(state.x)) + c[:, None]
        return ConditionedTokens(tokens, shared_block_input(c, self.layout))


class Toy(StagedModel):
    """The whole model."""

    counted_tables = ("pos_embed.table",)

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        super().__init__()
        self.config = config
        width = param.width_dim()
        self.x_embedder = PatchEmbedder(config.in_channels, width, config.patch_size, param)
        self.t_embedder = TimestepEmbedder(width, param)
        self.y_embedder = LabelEmbedder(config.num_classes, width, param)
        self.pos_embed = SinCosPositions(config.width, patches_per_side(config))
        self.blocks = nn.ModuleList(
            Block(config, param, index, self.hidden(config, param)) for index in range(config.depth)
        )
        out = config.patch_size**2 * config.out_channels
        self.final_layer = AdaLNReadout(width, out, param, 1e-6, config.norm_precision, num_patches(config))
        self._ends = (Embed(self), SquareReadoutStage(config, self.final_layer))

    def hidden(self, config: ModelConfig, param: Parametrization) -> Dim:
        """The MLP's channels, which grow with the width."""
        return param.width_dim(config.mlp_ratio)

    def stages(self) -> list[Stage]:
        """Embedding, blocks, readout."""
        first, last = self._ends
        return [first, *cast("Iterable[Stage]", self.blocks), last]

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> ModelInputs:
        """With labels."""
        check_square(x, self.config)
        return ModelInputs(x, t.float(), labels=class_labels(cond, self.config))


class FaultyToy(Toy):
    """Declares its MLP's channels as a number that does not grow, so that its second layer gets an input's rate."""

    def hidden(self, config: ModelConfig, param: Parametrization) -> Dim:
        """As many as they are, without a base."""
        return Dim(param.width_dim(config.mlp_ratio).size)
