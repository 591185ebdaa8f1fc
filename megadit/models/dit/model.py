"""DiT (Peebles and Xie, arXiv 2212.09748), class-conditional or unconditional, under SP or muP (arXiv 2505.15270).

Shapes: B batch, C channels, H x W latent, T tokens, n width. Parameter names are the official ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.models.layers import (
    AdaLNReadout,
    LabelEmbedder,
    Mlp,
    ModulatedNorm,
    PatchEmbedder,
    SinCosPositions,
    TimestepEmbedder,
    adaln_modulation,
)
from megadit.models.patches import (
    ConditionedTokens,
    SquareReadoutStage,
    check_square,
    class_labels,
    num_patches,
    patches_per_side,
    self_attention,
)
from megadit.models.stages import ModelInputs, Stage, StagedModel
from megadit.mup.rules import Parametrization
from megadit.parallel.collectives import scatter_sequence, shared_block_input
from megadit.parallel.tensor import tensor_layout

_LN_EPS = 1e-6


class DiTBlock(Stage):
    """adaLN-zero Transformer block; the condition is SiLU(c)."""

    takes = ConditionedTokens
    takes_pending = is_block = True

    def __init__(self, config: ModelConfig, param: Parametrization, index: int) -> None:
        super().__init__()
        width = param.width_dim()
        self.prefix = f"blocks.{index}."
        self.attn = self_attention(config, param, num_patches(config))
        self.mlp = Mlp(width, param.width_dim(config.mlp_ratio), param, config.mlp, tokens=num_patches(config))
        self.norm = ModulatedNorm(_LN_EPS, config.norm_precision)
        self.adaLN_modulation = adaln_modulation(width, 6, param)

    def run(self, state: ConditionedTokens) -> ConditionedTokens:
        """Attention, then the MLP, each normed, modulated and added through its gate."""
        modulation = self.adaLN_modulation(state.condition)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x, normed = self.norm.of_stream(state.tokens, state.pending, shift_msa, scale_msa)
        x, normed = self.norm.after_residual(x, gate_msa, self.attn(normed), shift_mlp, scale_mlp)
        return ConditionedTokens(x, state.condition, (self.mlp(normed), gate_mlp))


class DiTEmbedStage(Stage):
    """Embeds the patches, the timestep and the label; its modules are the model's."""

    takes = ModelInputs

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.x_embedder, self.pos_embed = model.x_embedder, model.pos_embed
        self.t_embedder, self.y_embedder = model.t_embedder, model.y_embedder
        self.layout = tensor_layout()

    def run(self, state: ModelInputs) -> ConditionedTokens:
        """condition = SiLU(timestep embedding + label embedding), as all of its users take it."""
        tokens = self.pos_embed(self.x_embedder(state.x))
        c = self.t_embedder(state.t)
        if self.y_embedder is not None:
            c = c + self.y_embedder(state.labels)
        return ConditionedTokens(scatter_sequence(tokens, self.layout), shared_block_input(F.silu(c), self.layout))


class DiT(StagedModel):
    """DiT as stages: embedding, blocks, final layer."""

    counted_tables = ("pos_embed.table",)

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        """Build with uninitialised parameters; ``megadit.mup.init.init_parameters`` fills them."""
        super().__init__()
        self.config = config
        self.stream_tokens = num_patches(config)
        width = param.width_dim()
        self.x_embedder = PatchEmbedder(config.in_channels, width, config.patch_size, param)
        self.t_embedder = TimestepEmbedder(width, param)
        self.y_embedder = LabelEmbedder(config.num_classes, width, param) if config.num_classes else None
        self.pos_embed = SinCosPositions(config.width, patches_per_side(config))
        self.blocks = nn.ModuleList(DiTBlock(config, param, index) for index in range(config.depth))
        out = config.patch_size**2 * config.out_channels
        self.final_layer = AdaLNReadout(width, out, param, _LN_EPS, config.norm_precision, self.stream_tokens)
        # In a tuple, so that they are not registered: their parameters are the model's own.
        self._ends = (DiTEmbedStage(self), SquareReadoutStage(config, self.final_layer))

    def stages(self) -> list[Stage]:
        """Embedding, the blocks, the final layer."""
        first, last = self._ends
        return [first, *cast("Iterable[Stage]", self.blocks), last]

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> ModelInputs:
        """x, t and, unless the model is unconditional, labels."""
        check_square(x, self.config)
        return ModelInputs(x, t.float(), labels=class_labels(cond, self.config) if self.config.num_classes else None)
