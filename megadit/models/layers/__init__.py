"""Layers shared by the families; each declares the global dims of its parameters to the parametrization."""

from megadit.models.layers.adaln import AdaLNReadout, adaln_modulation
from megadit.models.layers.attention import (
    CrossAttention,
    SelfAttention,
    StreamAttention,
    StreamQKV,
    attend,
    joint_attention,
    text_padding,
)
from megadit.models.layers.conv import MuConv
from megadit.models.layers.embed import (
    CaptionEmbedder,
    LabelEmbedder,
    MuEmbedding,
    MuTokens,
    PatchEmbedder,
    TimestepEmbedder,
    unpatchify,
)
from megadit.models.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megadit.models.layers.mlp import Mlp
from megadit.models.layers.norm import ModulatedNorm, MuLayerNorm, MuRMSNorm, PendingResidual, add_residual
from megadit.models.layers.positions import CroppedPositions, SinCosPositions, sincos_2d, timestep_features

__all__ = [
    "AdaLNReadout",
    "CaptionEmbedder",
    "ColumnParallelLinear",
    "CroppedPositions",
    "CrossAttention",
    "LabelEmbedder",
    "Mlp",
    "ModulatedNorm",
    "MuConv",
    "MuEmbedding",
    "MuLayerNorm",
    "MuRMSNorm",
    "MuTokens",
    "PatchEmbedder",
    "PendingResidual",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SelfAttention",
    "SinCosPositions",
    "StreamAttention",
    "StreamQKV",
    "TimestepEmbedder",
    "adaln_modulation",
    "add_residual",
    "attend",
    "joint_attention",
    "sincos_2d",
    "text_padding",
    "timestep_features",
    "unpatchify",
]
