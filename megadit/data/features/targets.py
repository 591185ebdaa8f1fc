"""``TargetFeatures``: what REPA aligns a model's tokens with, from batches of the run's data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.config.schema.data import FeatureSource
from megadit.config.schema.run import RunConfig
from megadit.data.batch import Batch
from megadit.data.dataset import ImageSet
from megadit.data.features.encoders import DIM, CachedEncoder, Dinov2, EfficientNetLite0, FeatureEncoder
from megadit.data.features.folders import check_dinov2, check_packages
from megadit.data.text.folders import size
from megadit.errors import UserError


class TargetFeatures:
    """Features of a batch's own pictures (mirrored where they are) on the model's grid of ``side`` x ``side`` tokens.

    Raises UserError as the encoders do.
    """

    def __init__(self, source: FeatureSource, side: int, device: torch.device | str = "cpu") -> None:
        self.encoder = build_encoder(source, device)
        self.side, self.device = side, torch.device(device)

    def of(self, batch: Batch) -> Tensor:
        """Float32 (B, T, F), tokens row-major, on the device."""
        if self.encoder is None:
            features = batch.extras["features"].to(self.device).float()
        else:
            features = self.encoder.encode(batch.images.to(self.device)).to(self.device)
        return on_grid(features, self.side).flatten(2).transpose(1, 2)


def build_encoder(source: FeatureSource, device: torch.device | str = "cpu") -> FeatureEncoder | None:
    """The encoder of ``data.features``; None where the data store the features. Raises UserError as encoders do."""
    if source.encoder == "stored":
        return None
    encoder: FeatureEncoder
    if source.encoder == "dinov2":
        encoder = Dinov2(source.path, source.image_size, device)
    else:
        encoder = EfficientNetLite0(source.image_size, device)
    return encoder if source.cache is None else CachedEncoder(encoder, Path(source.cache).expanduser())


def on_grid(features: Tensor, side: int) -> Tensor:
    """Features (B, F, h, w) as (B, F, side, side): averaged where the grid is finer, bilinear where it is coarser."""
    if features.shape[-2:] == (side, side):
        return features
    if min(features.shape[-2:]) >= side:
        return F.adaptive_avg_pool2d(features, side)
    return F.interpolate(features, size=(side, side), mode="bilinear", align_corners=False)


def check_features(config: RunConfig, images: ImageSet) -> None:
    """Check that ``data.features`` gives the features that ``model.repa`` expects; loads no network.

    Raises:
        UserError: packages, folder or stored features are missing, their channels are not ``model.repa.feature_dim``,
            there are no pictures to encode, or stored features would not follow ``data.flip``.
    """
    source, repa = config.data.features, config.model.repa
    if source is None or repa is None:
        return
    dim = _dim(source, images, config.data.flip)
    if dim != repa.feature_dim:
        raise UserError(
            f"model.repa.feature_dim: {repa.feature_dim}, but data.features.encoder {source.encoder} gives {dim} "
            f"channels; set model.repa.feature_dim={dim}"
        )


def _dim(source: FeatureSource, images: ImageSet, flip: bool) -> int:
    if source.encoder == "stored":
        return _stored_dim(images, flip)
    if images.stores_latents:
        raise UserError(
            f"data.features.encoder: {source.encoder} looks at pictures, but {images.name} holds latents; store the "
            "features beside them and choose stored"
        )
    if source.encoder == "dinov2":
        return size(check_dinov2(source.path, source.image_size), "hidden_size")
    check_packages()
    return DIM


def _stored_dim(images: ImageSet, flip: bool) -> int:
    features = images.extras(0).get("features")
    if features is None:
        raise UserError(
            f"data.features.encoder: stored, but {images.name} holds no features; write them with its shards, or "
            "choose efficientnet-lite0 or dinov2"
        )
    if features.dim() != 3:
        raise UserError(
            f"data.features.encoder: stored features of {images.name} have shape {tuple(features.shape)}, not "
            "(channels, rows, columns); write them again"
        )
    if flip and images.mirrored is None:
        raise UserError(
            f"data.flip: true, but {images.name} holds no features of mirrored pictures; set it to false, or write the "
            "shards with data.flip=true"
        )
    return int(features.shape[0])
