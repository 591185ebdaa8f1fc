"""Keyed example inputs of a model: what counting, coordinate checks and comparisons feed where there are no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megadit import rng
from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig


def example_images(config: ModelConfig, numbers: Sequence[int]) -> Tensor:
    """Normal images, float32 (B, C, H, W); the one of a number is the same whatever the batch or the width."""
    shape = (config.in_channels, config.input_size, config.input_size)
    return rng.batch_normal(rng.sample_keys(0, "coord-image", torch.tensor(list(numbers))), shape)


def example_features(config: ModelConfig, numbers: Sequence[int]) -> Tensor:
    """REPA targets, float32 (B, T, F): normal, around a mean that all tokens share, as those of real encoders are."""
    assert config.repa is not None
    shape = ((config.input_size // config.patch_size) ** 2, config.repa.feature_dim)
    mean = rng.normal(rng.stream_key(0, "example-feature-mean"), shape[1:])
    return mean + rng.batch_normal(rng.sample_keys(0, "example-features", torch.tensor(list(numbers))), shape)


def example_conditioning(config: ModelConfig, numbers: Sequence[int]) -> Conditioning:
    """Labels that go round; texts of normal features and of all lengths from one token to the longest."""
    labels = torch.arange(len(numbers)) % config.num_classes if config.num_classes else None
    if config.text is None:
        return Conditioning(labels=labels)
    ids = torch.tensor(list(numbers))
    length, pooled_dim = config.text.max_length, config.text.pooled_dim
    golden = 0.618034 * torch.arange(len(numbers), dtype=torch.float64)  # spreads any number of them evenly
    lengths = 1 + ((golden - golden.floor()) * length).long()
    return Conditioning(
        labels=labels,
        text=rng.batch_normal(rng.sample_keys(0, "example-text", ids), (length, config.text.dim)),
        text_mask=torch.arange(length) < lengths[:, None],
        pooled=rng.batch_normal(rng.sample_keys(0, "example-pooled", ids), (pooled_dim,)) if pooled_dim else None,
    )
