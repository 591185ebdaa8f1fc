"""MMDiT (Esser et al., arXiv 2403.03206): text to image with two streams of tokens and joint attention, SP or muP.

Shapes: B batch, C channels, H x W latent, T image tokens, L text tokens, n width. Parameter names are those of the
authors' own checkpoints (Stable Diffusion 3). Its sizes of arXiv 2505.15270, section 5.2, have a SwiGLU MLP of hidden
size 4n and no pooled text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import Conditioning, checked_text
from megadit.config.schema.model import ModelConfig
from megadit.models.layers import (
    AdaLNReadout,
    ColumnParallelLinear,
    CroppedPositions,
    Mlp,
    ModulatedNorm,
    PatchEmbedder,
    PendingResidual,
    ReplicatedLinear,
    RowParallelLinear,
    StreamAttention,
    StreamQKV,
    TimestepEmbedder,
    adaln_modulation,
    add_residual,
    joint_attention,
    text_padding,
    unpatchify,
)
from megadit.models.patches import num_patches, patches_per_side
from megadit.models.stages import ModelInputs, ModelOutput, Stage, StagedModel, StageIO, StageState
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.collectives import gather_sequence, scatter_sequence, shared_block_input
from megadit.parallel.tensor import tensor_layout

_LN_EPS = 1e-6


def _text_tokens(config: ModelConfig) -> int:
    assert config.text is not None  # held by the configuration
    return config.text.max_length


class MMDiTStream(nn.Module):
    """One stream's half of a block: adaLN-zero around joint attention and an MLP, all with weights of its own.

    ``pre_only``: the stream gives keys and values and is not updated (the context of the last block): two chunks of
    modulation, shift and scale, and neither an output projection nor an MLP. ``tokens``: T of the stream; see
    ``MuLinear``.
    """

    def __init__(self, config: ModelConfig, param: Parametrization, tokens: int, *, pre_only: bool = False) -> None:
        super().__init__()
        width = param.width_dim()
        self.pre_only = pre_only
        self.attn = StreamAttention(
            width,
            config.num_heads,
            param,
            qk_norm=config.qk_norm == "rms",
            qkv_bias=config.qkv_bias,
            pre_only=pre_only,
            norm_precision=config.norm_precision,
            tokens=tokens,
        )
        self.norm = ModulatedNorm(_LN_EPS, config.norm_precision)
        hidden = param.width_dim(config.mlp_ratio)
        self.mlp = None if pre_only else Mlp(width, hidden, param, config.mlp, tokens=tokens)
        self.adaLN_modulation = adaln_modulation(width, 2 if pre_only else 6, param)

    def project_qkv(
        self, x: Tensor, pending: PendingResidual, c: Tensor
    ) -> tuple[Tensor, StreamQKV, tuple[Tensor, ...]]:
        """x (B, T, n) with what the block before left pending, c = SiLU(condition) (B, n) -> x complete, q, k, v of T
        tokens, and the chunks of modulation (B, n) that ``apply_residual`` needs: gate, then shift, scale and gate of
        the MLP; none if ``pre_only``."""
        shift, scale, *modulation = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=1)
        x, normed = self.norm.of_stream(x, pending, shift, scale)
        return x, self.attn(normed), tuple(modulation)

    def apply_residual(
        self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]
    ) -> tuple[Tensor, PendingResidual]:
        """x (B, T, n) plus the attention's output, (B, T, heads, d), projected and gated, and the MLP's residual."""
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        assert self.mlp is not None
        x, normed = self.norm.after_residual(x, gate_msa, self.attn.project(attended), shift_mlp, scale_mlp)
        return x, (self.mlp(normed), gate_mlp)


@dataclass(frozen=True)
class MMDiTState(StageState):
    """tokens (B, T, n) of the image, context (B, L, n), condition (B, n), which is SiLU(c).

    key_padding: which keys are attended to, all but padding: bool (B, 1, 1, T + L), or lengths, int32 (2, 2 B + 1), as
    ``attend`` takes them; None: all are. grid: uint8 (rows, columns), of which the final layer reads the shape alone:
    how the tokens lie. pending: of the image, then of the context, two tensors each.
    """

    tokens: Tensor
    context: Tensor
    condition: Tensor
    key_padding: Tensor | None
    grid: Tensor
    pending: tuple[Tensor, ...] = ()

    @classmethod
    def unpack(cls, tensors: StageIO) -> MMDiTState:
        """The padding, if there is any, is no uint8; what comes after the grid is pending."""
        tokens, context, condition, *rest = tensors
        padding = rest.pop(0) if rest[0].dtype != torch.uint8 else None
        grid, *pending = rest
        return cls(tokens, context, condition, padding, grid, tuple(pending))

    def complete(self) -> MMDiTState:
        tokens, context = add_residual(self.tokens, self.pending[:2]), add_residual(self.context, self.pending[2:])
        return MMDiTState(tokens, context, self.condition, self.key_padding, self.grid)


@dataclass(frozen=True)
class MMDiTReadout(StageState):
    """``MMDiTState`` after the last block: tokens (B, T, n), condition (B, n) and grid (rows, columns)."""

    tokens: Tensor
    condition: Tensor
    grid: Tensor
    pending: PendingResidual = ()

    @classmethod
    def unpack(cls, tensors: StageIO) -> MMDiTReadout:
        """What comes after the grid is pending."""
        tokens, condition, grid, *pending = tensors
        return cls(tokens, condition, grid, tuple(pending))

    def complete(self) -> MMDiTReadout:
        return MMDiTReadout(add_residual(self.tokens, self.pending), self.condition, self.grid)


class MMDiTBlock(Stage):
    """A block of both streams; the last does not update the context, and drops it."""

    takes = MMDiTState
    takes_pending = is_block = True

    def __init__(self, config: ModelConfig, param: Parametrization, index: int) -> None:
        super().__init__()
        self.prefix = f"joint_blocks.{index}."
        self.last = index == config.depth - 1
        self.precision = config.attention_precision
        self.context_block = MMDiTStream(config, param, _text_tokens(config), pre_only=self.last)
        self.x_block = MMDiTStream(config, param, num_patches(config))

    def run(self, state: MMDiTState) -> StageState:
        """Joint attention, then each stream's own MLP."""
        c = state.condition
        context, context_qkv, context_modulation = self.context_block.project_qkv(state.context, state.pending[2:], c)
        x, image_qkv, image_modulation = self.x_block.project_qkv(state.tokens, state.pending[:2], c)
        image_attended, context_attended = joint_attention(
            image_qkv, context_qkv, state.key_padding, context_queries=not self.last, precision=self.precision
        )
        x, pending = self.x_block.apply_residual(x, image_attended, image_modulation)
        if self.last:
            return MMDiTReadout(x, c, state.grid, pending)
        context, of_context = self.context_block.apply_residual(context, context_attended, context_modulation)
        return MMDiTState(x, context, c, state.key_padding, state.grid, (*pending, *of_context))


class PooledEmbedder(nn.Module):
    """Linear, SiLU, Linear on the pooled feature of a text: (B, P) -> (B, n)."""

    def __init__(self, features: int, width: Dim, param: Parametrization) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            ColumnParallelLinear(Dim(features), width, param, init="text"),
            nn.SiLU(),
            RowParallelLinear(width, width, param, init="text"),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Cast the feature to the weights' dtype and embed it."""
        return self.mlp(pooled.to(next(self.mlp.parameters()).dtype))


class MMDiTEmbedStage(Stage):
    """Embeds the patches, the text, the timestep and the pooled text; its modules are the model's."""

    takes = ModelInputs

    def __init__(self, model: MMDiT) -> None:
        super().__init__()
        self.x_embedder, self.pos_embed = model.x_embedder, model.pos_embed
        self.t_embedder, self.y_embedder = model.t_embedder, model.y_embedder
        self.context_embedder = model.context_embedder
        self.config = model.config
        self.layout = tensor_layout()

    def run(self, state: ModelInputs) -> MMDiTState:
        """condition = SiLU(timestep embedding + pooled text's embedding), as all of its users take it."""
        assert state.text is not None  # held by ``MMDiT.inputs``
        rows, columns = (side // self.config.patch_size for side in state.x.shape[-2:])
        tokens = self.pos_embed(self.x_embedder(state.x), rows, columns)
        text, padding = text_padding(
            state.text,
            state.text_mask,
            state.text_lengths,
            tokens,
            self.config.head_channels,
            keys_before=rows * columns,
            precision=self.config.attention_precision,
        )
        context = self.context_embedder(text.to(self.context_embedder.weight.dtype))
        c = self.t_embedder(state.t)
        if self.y_embedder is not None:
            c = c + self.y_embedder(state.pooled)
        grid = torch.zeros(rows, columns, dtype=torch.uint8, device=tokens.device)
        tokens, context = scatter_sequence(tokens, self.layout), scatter_sequence(context, self.layout)
        return MMDiTState(tokens, context, shared_block_input(F.silu(c), self.layout), padding, grid)


class MMDiTFinalStage(Stage):
    """From tokens (B, T, n) on their grid to the image (B, C, H, W)."""

    takes = MMDiTReadout
    takes_pending = True

    def __init__(self, model: MMDiT) -> None:
        super().__init__()
        self.final_layer = model.final_layer
        self.config = model.config
        self.layout = tensor_layout()

    def run(self, state: MMDiTReadout) -> ModelOutput:
        """Read out the patches, all-gather them under sequence parallelism, and assemble the image."""
        rows, columns = state.grid.shape
        readout = self.final_layer(state.tokens, state.condition, state.pending)
        patches = gather_sequence(readout, self.layout, rows * columns)
        return ModelOutput(unpatchify(patches, rows, columns, self.config.patch_size, self.config.out_channels))


class MMDiT(StagedModel):
    """MMDiT as stages: embedding, joint blocks, final layer."""

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        """Build with uninitialised parameters; ``megadit.mup.init.init_parameters`` fills them."""
        super().__init__()
        self.config = config
        self.stream_tokens = num_patches(config)
        assert config.text is not None  # held by the configuration
        width = param.width_dim()
        self.x_embedder = PatchEmbedder(config.in_channels, width, config.patch_size, param)
        self.t_embedder = TimestepEmbedder(width, param)
        self.y_embedder = PooledEmbedder(config.text.pooled_dim, width, param) if config.text.pooled_dim else None
        self.context_embedder = ReplicatedLinear(Dim(config.text.dim), width, param, init="text")
        self.pos_embed = CroppedPositions(config.width, patches_per_side(config), config.pos_embed_max_size)
        self.joint_blocks = nn.ModuleList(MMDiTBlock(config, param, index) for index in range(config.depth))
        out = config.patch_size**2 * config.out_channels
        self.final_layer = AdaLNReadout(width, out, param, _LN_EPS, config.norm_precision, self.stream_tokens)
        # In a tuple, so that they are not registered: their parameters are the model's own.
        self._ends = (MMDiTEmbedStage(self), MMDiTFinalStage(self))

    def stages(self) -> list[Stage]:
        """Embedding, the blocks, the final layer."""
        first, last = self._ends
        return [first, *cast("Iterable[Stage]", self.joint_blocks), last]

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> ModelInputs:
        """x, t, text, its mask and its pooled feature. x may have any whole number of patches that has positions.

        Sequence parallelism fixes the lengths of the streams: x of ``input_size``, text of ``text.max_length`` tokens.
        """
        self._check_size(x)
        text = self.config.text
        assert text is not None
        states, mask = checked_text(cond, text.dim, None)
        if self.layout.sequence and states.shape[1] != text.max_length:
            raise ValueError(
                f"cond.text: {tuple(states.shape)} has not {text.max_length} tokens (text.max_length), as sequence "
                "parallelism needs; pad it and mask the padding"
            )
        if text.pooled_dim and (cond.pooled is None or cond.pooled.shape[-1] != text.pooled_dim):
            shape = "none" if cond.pooled is None else tuple(cond.pooled.shape)
            raise ValueError(f"cond.pooled: {shape}, but this model takes pooled features (B, {text.pooled_dim})")
        pooled = cond.pooled if text.pooled_dim else None
        return ModelInputs(x, t.float(), states, pooled, text_mask=mask, text_lengths=cond.text_lengths)

    def _check_size(self, x: Tensor) -> None:
        patch, limit = self.config.patch_size, self.config.pos_embed_max_size
        height, width = x.shape[-2:]
        if self.layout.sequence and (height, width) != (self.config.input_size, self.config.input_size):
            raise ValueError(
                f"x: {tuple(x.shape)} is not of input_size {self.config.input_size}, as sequence parallelism needs"
            )
        if height % patch or width % patch:
            raise ValueError(f"x: {tuple(x.shape)} is not made of whole patches of {patch} x {patch}")
        if not self.pos_embed.fits(height // patch, width // patch):
            raise ValueError(f"x: {tuple(x.shape)} has more than {limit} patches (pos_embed_max_size) along a side")
