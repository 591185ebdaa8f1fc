"""PixArt-alpha (Chen et al., arXiv 2310.00426): text to image, under SP or muP (arXiv 2505.15270).

Shapes: B batch, C channels, H x W latent, T image tokens, L text tokens, n width. Parameter names are the official
ones. With ``qk_norm`` the queries and keys of self-attention are normed, those of cross-attention are not; with
``attention_precision`` fp32 self-attention is computed in float32, cross-attention is not, as in the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning, checked_text
from megadit.config.schema.model import ModelConfig, TextInput
from megadit.models.layers import (
    CaptionEmbedder,
    ColumnParallelLinear,
    CrossAttention,
    Mlp,
    ModulatedNorm,
    PatchEmbedder,
    PendingResidual,
    ReplicatedLinear,
    SinCosPositions,
    TimestepEmbedder,
    add_residual,
    text_padding,
)
from megadit.models.patches import (
    ConditionedTokens,
    SquareReadoutStage,
    check_square,
    num_patches,
    patches_per_side,
    self_attention,
)
from megadit.models.stages import ModelInputs, Stage, StagedModel, StageIO, StageState
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim, ParamSpec
from megadit.parallel.collectives import copy_to_tensor_parallel_region, scatter_sequence, shared_block_input
from megadit.parallel.tensor import TensorLayout, tensor_layout
from megadit_kernels import gated_residual

_LN_EPS = 1e-6


def _for_local_tokens(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, for use on this rank's tokens under sequence parallelism: sums its gradient there."""
    return copy_to_tensor_parallel_region(x, layout) if layout.sequence else x


def _table(rows: int, width: Dim, param: Parametrization) -> tuple[nn.Parameter, dict[str, ParamSpec]]:
    """adaLN-single's learned table (rows, n), added to the shared modulation; its rows are vectors in muP's sense."""
    spec = param.spec((Dim(rows), width), "modulation_table", role="vector", table=True)
    return nn.Parameter(torch.empty(rows, width.size)), {"scale_shift_table": spec}


@dataclass(frozen=True)
class PixArtState(StageState):
    """tokens (B, T, n), t0 (B, 6n), t_emb (B, n), text (B, L, n).

    text_padding: which tokens of the text are attended to, bool (B, 1, 1, L), or lengths, int32 (2, 2 B + 1), as
    ``attend`` takes them; None: all are.
    """

    tokens: Tensor
    t0: Tensor
    t_emb: Tensor
    text: Tensor
    text_padding: Tensor | None = None
    pending: PendingResidual = ()

    @classmethod
    def unpack(cls, tensors: StageIO) -> PixArtState:
        """The padding, if there is any, is of integers; what comes after it is pending."""
        tokens, t0, t_emb, text, *rest = tensors
        padding = rest.pop(0) if rest and not rest[0].is_floating_point() else None
        return cls(tokens, t0, t_emb, text, padding, tuple(rest))

    def complete(self) -> PixArtState:
        return replace(self, tokens=add_residual(self.tokens, self.pending), pending=())


class PixArtBlock(Stage):
    """Transformer block with adaLN-single and cross-attention; the last returns the input of the final layer."""

    takes = PixArtState
    takes_pending = is_block = True

    def __init__(self, config: ModelConfig, param: Parametrization, index: int) -> None:
        super().__init__()
        width, heads, tokens = param.width_dim(), config.num_heads, num_patches(config)
        self.prefix = f"blocks.{index}."
        self.last = index == config.depth - 1
        self.layout = tensor_layout()
        self.scale_shift_table, self.param_specs = _table(6, width, param)
        self.attn = self_attention(config, param, tokens)
        self.cross_attn = CrossAttention(width, heads, param, bias=config.qkv_bias, tokens=tokens)
        self.mlp = Mlp(width, param.width_dim(config.mlp_ratio), param, config.mlp, tokens=tokens)
        self.norm = ModulatedNorm(_LN_EPS, config.norm_precision)

    def run(self, state: PixArtState) -> StageState:
        """Self-attention, cross-attention to the text and the MLP; the first and the last normed, modulated, gated."""
        table = _for_local_tokens(self.scale_shift_table, self.layout)
        # The sum of the six vectors per sample and the rows of the table is never materialised.
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = state.t0.chunk(6, dim=1)
        rows = table.to(state.t0.dtype).unbind(0)
        x, normed = self.norm.of_stream(
            state.tokens, state.pending, shift_msa, scale_msa, shift_row=rows[0], scale_row=rows[1]
        )
        x = gated_residual(x, gate_msa, self.attn(normed), gate_row=rows[2])
        text = self.cross_attn(x, state.text, state.text_padding)
        x, normed = self.norm.after_residual(x, None, text, shift_mlp, scale_mlp, shift_row=rows[3], scale_row=rows[4])
        pending = (self.mlp(normed), gate_mlp, rows[5])
        return ConditionedTokens(x, state.t_emb, pending) if self.last else replace(state, tokens=x, pending=pending)


class PixArtFinalLayer(nn.Module):
    """Norm, modulate and read out: (B, T, n), t_emb (B, n) -> (B, T, p * p * out_channels)."""

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        super().__init__()
        width = param.width_dim()
        out = Dim(config.patch_size**2 * config.out_channels)
        self.layout = tensor_layout()
        self.linear = ReplicatedLinear(width, out, param, init="readout", tokens=num_patches(config))
        self.scale_shift_table, self.param_specs = _table(2, width, param)
        self.norm = ModulatedNorm(_LN_EPS, config.norm_precision)

    def forward(self, x: Tensor, t_emb: Tensor, pending: PendingResidual = ()) -> Tensor:
        """Modulation is the table plus t_emb itself, in the order shift, scale. ``pending``: of the last block."""
        table = _for_local_tokens(self.scale_shift_table, self.layout)
        shift_row, scale_row = table.to(t_emb.dtype).unbind(0)
        _, normed = self.norm.of_stream(x, pending, t_emb, t_emb, shift_row=shift_row, scale_row=scale_row)
        return self.linear(normed)


class PixArtEmbedStage(Stage):
    """Embeds the patches, the text and the timestep; its modules are the model's."""

    takes = ModelInputs

    def __init__(self, model: PixArt) -> None:
        super().__init__()
        self.x_embedder, self.pos_embed = model.x_embedder, model.pos_embed
        self.t_embedder, self.t_block = model.t_embedder, model.t_block
        self.y_embedder = model.y_embedder
        self.head_dim = model.config.head_channels
        self.layout = tensor_layout()

    def run(self, state: ModelInputs) -> PixArtState:
        """Computes the modulation t0 (B, 6n) that all blocks share, too."""
        tokens = self.pos_embed(self.x_embedder(state.x))
        t_emb = self.t_embedder(state.t)
        t0 = self.t_block(t_emb)
        assert state.text is not None  # held by ``PixArt.inputs``
        text, padding = text_padding(
            state.text, state.text_mask, state.text_lengths, tokens, self.head_dim, queries=tokens.shape[1]
        )
        text = shared_block_input(self.y_embedder(text), self.layout)
        tokens = scatter_sequence(tokens, self.layout)
        return PixArtState(tokens, t0, _for_local_tokens(t_emb, self.layout), text, padding)


class PixArt(StagedModel):
    """PixArt as stages: embedding, blocks, final layer."""

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        """Build with uninitialised parameters; ``megadit.mup.init.init_parameters`` fills them."""
        super().__init__()
        self.config = config
        self.stream_tokens = num_patches(config)
        self.text = cast("TextInput", config.text)  # held by the configuration
        width = param.width_dim()
        sixfold = Dim(6 * width.size, 6 * width.base_size)
        self.x_embedder = PatchEmbedder(config.in_channels, width, config.patch_size, param)
        self.t_embedder = TimestepEmbedder(width, param)
        self.t_block = nn.Sequential(
            nn.SiLU(), ColumnParallelLinear(width, sixfold, param, init="adaln", gather_output=True)
        )
        self.y_embedder = CaptionEmbedder(self.text.dim, self.text.max_length, width, param)
        self.pos_embed = SinCosPositions(config.width, patches_per_side(config), config.pos_scale)
        self.blocks = nn.ModuleList(PixArtBlock(config, param, index) for index in range(config.depth))
        self.final_layer = PixArtFinalLayer(config, param)
        # In a tuple, so that they are not registered: their parameters are the model's own.
        self._ends = (PixArtEmbedStage(self), SquareReadoutStage(config, self.final_layer))

    def stages(self) -> list[Stage]:
        """Embedding, the blocks, the final layer."""
        first, last = self._ends
        return [first, *cast("Iterable[Stage]", self.blocks), last]

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> ModelInputs:
        """x, t, text and its mask. Without a mask all tokens of the text are attended to.

        A text may have fewer tokens than ``max_length``; padding it, with a mask, does not change the output.
        """
        check_square(x, self.config)
        text, mask = checked_text(cond, self.text.dim, self.text.max_length)
        return ModelInputs(x, t.float(), text, text_mask=mask, text_lengths=cond.text_lengths)
