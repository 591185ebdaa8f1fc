"""Layers that all families share. Each declares its global dims to the parametrization when it is built."""

from megadit.models.layers.attention import SelfAttention, attend
from megadit.models.layers.conv import MuConv
from megadit.models.layers.cropped_positions import CroppedPositions
from megadit.models.layers.embed import LabelEmbedder, PatchEmbedder, SinCosPositions, TimestepEmbedder, unpatchify
from megadit.models.layers.joint_attention import StreamAttention, joint_attention
from megadit.models.layers.linear import MuEmbedding, MuLinear, MuPatchProjection, MuTokens
from megadit.models.layers.mlp import Mlp
from megadit.models.layers.modulation import adaln_modulation
from megadit.models.layers.norm import ModulatedNorm, MuLayerNorm, MuRMSNorm
from megadit.models.layers.positions import sincos_2d, timestep_features
from megadit.models.layers.readout import AdaLNReadout

__all__ = [
    "AdaLNReadout",
    "CroppedPositions",
    "LabelEmbedder",
    "Mlp",
    "ModulatedNorm",
    "MuConv",
    "MuEmbedding",
    "MuLayerNorm",
    "MuLinear",
    "MuPatchProjection",
    "MuRMSNorm",
    "MuTokens",
    "PatchEmbedder",
    "SelfAttention",
    "SinCosPositions",
    "StreamAttention",
    "TimestepEmbedder",
    "adaln_modulation",
    "attend",
    "joint_attention",
    "sincos_2d",
    "timestep_features",
    "unpatchify",
]
