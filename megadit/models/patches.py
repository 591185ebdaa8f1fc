"""Shared by families whose image tokens are patches on a square grid: grid sizes, checks of inputs, the readout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.models.layers import PendingResidual, SelfAttention, add_residual, unpatchify
from megadit.models.stages import ModelOutput, Stage, StageIO, StageState
from megadit.mup.rules import Parametrization
from megadit.parallel.collectives import gather_sequence
from megadit.parallel.tensor import tensor_layout


def patches_per_side(config: ModelConfig) -> int:
    """Number of patches along a side of an image of ``input_size``."""
    return config.input_size // config.patch_size


def num_patches(config: ModelConfig) -> int:
    """Number of patches, which is that of image tokens, of an image of ``input_size``."""
    return patches_per_side(config) ** 2


def check_square(x: Tensor, config: ModelConfig) -> None:
    """Raises ValueError: x (B, C, H, W) is not of ``input_size``."""
    size = config.input_size
    if x.shape[-2:] != (size, size):
        raise ValueError(f"x: {tuple(x.shape)} is not an image of {size} x {size}, the model's input_size")


def class_labels(cond: Conditioning, config: ModelConfig) -> Tensor:
    """The condition's labels, int64 (B,). Raises ValueError where it has none."""
    if cond.labels is None:
        raise ValueError(
            f"cond.labels: this model is class-conditional; give labels ({config.num_classes} is the null one)"
        )
    return cond.labels


def self_attention(config: ModelConfig, param: Parametrization, tokens: int) -> SelfAttention:
    """A block's self-attention over ``tokens`` tokens, by the configuration."""
    return SelfAttention(
        param.width_dim(),
        config.num_heads,
        param,
        qk_norm=config.qk_norm == "rms",
        qkv_bias=config.qkv_bias,
        precision=config.attention_precision,
        norm_precision=config.norm_precision,
        tokens=tokens,
    )


@dataclass(frozen=True)
class ConditionedTokens(StageState):
    """State between blocks that are modulated by one vector per image: tokens (B, T, n), condition (B, n)."""

    tokens: Tensor
    condition: Tensor
    pending: PendingResidual = ()

    @classmethod
    def unpack(cls, tensors: StageIO) -> ConditionedTokens:
        """What comes after the condition is pending."""
        tokens, condition, *pending = tensors
        return cls(tokens, condition, tuple(pending))

    def complete(self) -> ConditionedTokens:
        return ConditionedTokens(add_residual(self.tokens, self.pending), self.condition)


class SquareReadoutStage(Stage):
    """From tokens (B, T, n) to the image (B, C, H, W), by ``final_layer(tokens, condition, pending)``
    -> (B, T, p * p * C).

    T counts the image's patches, under sequence parallelism this rank's; p is ``patch_size``, C ``out_channels``.
    """

    takes = ConditionedTokens
    takes_pending = True

    def __init__(self, config: ModelConfig, final_layer: nn.Module) -> None:
        super().__init__()
        self.final_layer = final_layer
        self.config = config
        self.layout = tensor_layout()

    def run(self, state: ConditionedTokens) -> ModelOutput:
        """Read out the patches, all-gather them under sequence parallelism, and assemble the image."""
        config, side = self.config, patches_per_side(self.config)
        readout = self.final_layer(state.tokens, state.condition, state.pending)
        patches = gather_sequence(readout, self.layout, side * side)
        return ModelOutput(unpatchify(patches, side, side, config.patch_size, config.out_channels))
