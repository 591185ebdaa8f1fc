"""U-ViT (Bao et al., arXiv 2209.12152): class-conditional, text-conditional or unconditional, under SP or muP.

Everything is a token: [label, time, patches], [time, text, patches] or [time, patches], with a learned position each.
Long skips carry the outputs of the first half of the blocks to the second half, last in, first out (``skip_linear``).
Shapes: B batch, C channels, T tokens, E of them beside the patches, L text length, n width. Parameter names are the
official ones, but for ``pos_embed.weight``, which is ``pos_embed`` there.

Under muP (arXiv 2505.15270) the long skip is a hidden layer of fan-in 2n. Without ``mlp_time_embed`` the time token is
the n sinusoidal features of t, without a parameter: its entries are Theta(1) at every width, as muP requires of a token
and as a learned input layer would make them. With the MLP these features are the input of a hidden layer of fan-in n.

Unlike in the original, a text shorter than ``text.max_length`` is padded and the padding masked as keys, so that it
does not change the output. Without a mask every text token is attended to, as in the original, and so is the padding
of a model with ``text.mask: false``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.conditioning import Conditioning, checked_text
from megadit.config.schema.model import ModelConfig, TextInput
from megadit.models.layers import (
    ColumnParallelLinear,
    Mlp,
    MuConv,
    MuEmbedding,
    MuLayerNorm,
    MuTokens,
    PatchEmbedder,
    PendingResidual,
    ReplicatedLinear,
    RowParallelLinear,
    add_residual,
    timestep_features,
    unpatchify,
)
from megadit.models.layers.skip_linear import skip_for_sharded_linear, skip_linear
from megadit.models.patches import check_square, class_labels, num_patches, patches_per_side, self_attention
from megadit.models.stages import ModelInputs, ModelOutput, Stage, StagedModel, StageIO, StageState
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.collectives import gather_sequence, scatter_sequence
from megadit.parallel.tensor import tensor_layout

_LN_EPS = 1e-5


def _extra_tokens(config: ModelConfig) -> int:
    """E, the number of tokens before the patches: time, label, text."""
    return 1 + (1 if config.num_classes else 0) + (config.text.max_length if config.text is not None else 0)


def _num_tokens(config: ModelConfig) -> int:
    """E + T."""
    return _extra_tokens(config) + num_patches(config)


@dataclass(frozen=True)
class UViTState(StageState):
    """tokens and skips (B, E + T, n), key_mask bool (B, E + T).

    Under tensor parallelism a skip holds this rank's channels (``skip_for_sharded_linear``).
    """

    tokens: Tensor
    skips: tuple[Tensor, ...] = ()
    key_mask: Tensor | None = None
    pending: PendingResidual = ()

    def pack(self) -> StageIO:
        """A pending branch is last, as (1, B, T, n), so that it is told from a skip."""
        return (*replace(self, pending=()).pack(), self.pending[0][None]) if self.pending else super().pack()

    @classmethod
    def unpack(cls, tensors: StageIO) -> UViTState:
        """All floats of three dimensions after the tokens are skips, the one that is no float is the mask."""
        tokens, *rest = tensors
        pending = (rest.pop()[0],) if rest and rest[-1].dim() == 4 else ()
        mask = rest.pop() if rest and not rest[-1].is_floating_point() else None
        return cls(tokens, tuple(rest), mask, pending)

    def complete(self) -> UViTState:
        return UViTState(add_residual(self.tokens, self.pending), self.skips, self.key_mask)


class UViTBlock(Stage):
    """Pre-norm Transformer block.

    Blocks ``1 .. depth / 2``, counted from 0, push their *input*, the output of the block before, onto the skips, so
    that no state holds one tensor twice. Blocks of the second half pop the last skip and join it.
    """

    takes = UViTState
    is_block = True

    def __init__(self, config: ModelConfig, param: Parametrization, index: int) -> None:
        super().__init__()
        width, half, tokens = param.width_dim(), config.depth // 2, _num_tokens(config)
        self.takes_pending = index <= half  # of the others a linear comes before the first norm
        self.pushes_skip, pops_skip = 0 < index <= half, index > half
        if pops_skip:
            self.prefix = f"out_blocks.{index - half - 1}."
        else:
            self.prefix = f"in_blocks.{index}." if index < half else "mid_block."
        self.norm1 = MuLayerNorm(width, param, _LN_EPS, config.norm_precision)
        self.attn = self_attention(config, param, tokens)
        self.norm2 = MuLayerNorm(width, param, _LN_EPS, config.norm_precision)
        self.mlp = Mlp(width, param.width_dim(config.mlp_ratio), param, config.mlp, tokens=tokens)
        self.skip_linear = skip_linear(width, param.width_dim(2), param, tokens) if pops_skip else None
        self.layout = tensor_layout()

    def run_on_own_inputs(self, compute: Callable[..., StageIO], tensors: StageIO) -> StageIO:
        """Only the skip that is joined goes in, and only the one that is pushed comes out."""
        state = UViTState.unpack(tensors)
        joined = 0 if self.skip_linear is None else 1
        handed_on = len(state.skips) - joined
        result = UViTState.unpack(compute(*replace(state, skips=state.skips[handed_on:]).pack()))
        return replace(result, skips=state.skips[:handed_on] + result.skips).pack()

    def run(self, state: UViTState) -> UViTState:
        """Push or join a skip, then attention and the MLP, each normed and added."""
        x, skips, mask = state.tokens, state.skips, state.key_mask
        if self.skip_linear is not None:
            x, skips = self.skip_linear(x, skips[-1]), skips[:-1]
        normed, x = self.norm1(x, *state.pending)
        if self.pushes_skip:
            skips = (*skips, skip_for_sharded_linear(x, self.layout))
        normed, x = self.norm2(x, self.attn(normed, None if mask is None else mask[:, None, None]))
        return UViTState(x, skips, mask, (self.mlp(normed),))


class UViTEmbedStage(Stage):
    """Embeds the patches, the timestep and the label or text; its modules are the model's."""

    takes = ModelInputs

    def __init__(self, model: UViT) -> None:
        super().__init__()
        self.width = model.config.width
        self.patch_embed, self.time_embed, self.pos_embed = model.patch_embed, model.time_embed, model.pos_embed
        self.label_emb, self.context_embed = model.label_emb, model.context_embed
        self.layout = tensor_layout()

    def run(self, state: ModelInputs) -> UViTState:
        """Make all tokens and add their positions; time and patches are never masked."""
        patches = self.patch_embed(state.x)
        time = timestep_features(state.t, self.width).to(patches.dtype)
        if self.time_embed is not None:
            time = self.time_embed(time)
        tokens = [time[:, None], patches]
        mask = state.text_mask
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(state.labels)[:, None])
        if self.context_embed is not None and state.text is not None:
            tokens.insert(1, self.context_embed(state.text.to(patches.dtype)))
        if mask is not None:
            mask = F.pad(mask, (1, patches.shape[1]), value=True)
        return UViTState(scatter_sequence(self.pos_embed(torch.cat(tokens, dim=1)), self.layout), key_mask=mask)


class UViTFinalStage(Stage):
    """From tokens (B, E + T, n) to the image (B, C, H, W)."""

    takes = UViTState
    takes_pending = True

    def __init__(self, model: UViT) -> None:
        super().__init__()
        self.norm, self.decoder_pred, self.final_layer = model.norm, model.decoder_pred, model.final_layer
        self.config, self.extra_tokens = model.config, model.extra_tokens
        self.layout = tensor_layout()

    def run(self, state: UViTState) -> ModelOutput:
        """Read out the patches, assemble the image, and apply the convolution, which smooths the patches' borders."""
        config = self.config
        side = patches_per_side(config)
        stream = (state.tokens, *state.pending)
        if not self.layout.sequence:  # a rank that holds all tokens reads out the patches alone
            stream = tuple(part[:, self.extra_tokens :] for part in stream)
        normed, _ = self.norm(*stream)
        readout = gather_sequence(self.decoder_pred(normed), self.layout, _num_tokens(config))
        patches = readout[:, -side * side :]
        image = unpatchify(patches, side, side, config.patch_size, config.out_channels)
        return ModelOutput(image if self.final_layer is None else self.final_layer(image))


class UViT(StagedModel):
    """U-ViT as stages: embedding, blocks, final stage. ``extra_tokens`` is E, the tokens before the patches."""

    def __init__(self, config: ModelConfig, param: Parametrization) -> None:
        """Build with uninitialised parameters; ``megadit.mup.init.init_parameters`` fills them."""
        super().__init__()
        self.config = config
        width, text = param.width_dim(), config.text
        self.extra_tokens, self.stream_tokens = _extra_tokens(config), _num_tokens(config)
        self.patch_embed = PatchEmbedder(config.in_channels, width, config.patch_size, param)
        self.time_embed = _time_mlp(param) if config.mlp_time_embed else None
        self.label_emb = MuEmbedding(config.num_classes + 1, width, param) if config.num_classes else None
        self.context_embed = ReplicatedLinear(Dim(text.dim), width, param, init="text") if text is not None else None
        self.pos_embed = MuTokens(self.stream_tokens, width, param)
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(UViTBlock(config, param, index) for index in range(half))
        self.mid_block = UViTBlock(config, param, half)
        self.out_blocks = nn.ModuleList(UViTBlock(config, param, half + 1 + index) for index in range(half))
        self.norm = MuLayerNorm(width, param, _LN_EPS, config.norm_precision)
        out = Dim(config.patch_size**2 * config.out_channels)
        self.decoder_pred = ReplicatedLinear(width, out, param, init="readout", tokens=self.stream_tokens)
        self.final_layer = MuConv(config.out_channels, 3, param) if config.conv else None
        # In a tuple, so that they are not registered: their parameters are the model's own.
        self._ends = (UViTEmbedStage(self), UViTFinalStage(self))

    def stages(self) -> list[Stage]:
        """Embedding, the blocks (depth + 1, with the middle one), the readout."""
        first, last = self._ends
        blocks = itertools.chain(self.in_blocks, [self.mid_block], self.out_blocks)
        return [first, *cast("Iterable[Stage]", blocks), last]

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens of the patches: (B, E + T, n) -> (B, T, n)."""
        return tokens[:, self.extra_tokens :]

    def inputs(self, x: Tensor, t: Tensor, cond: Conditioning) -> ModelInputs:
        """x, t, and labels, or the text padded to ``max_length`` and its mask, or neither.

        A text that is padded here, or comes with a mask, is masked; one of full length without a mask is not.
        """
        check_square(x, self.config)
        if self.label_emb is not None:
            return ModelInputs(x, t.float(), labels=class_labels(cond, self.config))
        if self.config.text is None:
            return ModelInputs(x, t.float())
        text, mask = _padded_text(cond, self.config.text)
        return ModelInputs(x, t.float(), text, text_mask=mask)


def _time_mlp(param: Parametrization) -> nn.Sequential:
    """MLP n -> 4n -> n with SiLU; both linears are hidden."""
    width, hidden = param.width_dim(), param.width_dim(4)
    return nn.Sequential(
        ColumnParallelLinear(width, hidden, param, init="timestep"),
        nn.SiLU(),
        RowParallelLinear(hidden, width, param, init="timestep"),
    )


def _padded_text(cond: Conditioning, config: TextInput) -> tuple[Tensor, Tensor | None]:
    """Text (B, max_length, dim) and mask (B, max_length). Raises ValueError for a missing text, or a wrong shape."""
    text, mask = checked_text(cond, config.dim, config.max_length)
    padding = config.max_length - text.shape[1]
    if padding and config.mask and mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    text = F.pad(text, (0, 0, 0, padding))
    return text, None if mask is None else F.pad(mask, (0, padding))
