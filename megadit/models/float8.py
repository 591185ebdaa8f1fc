"""Which linear layers of a model multiply in FP8, and how each does.

Those of the blocks that act on every token: qkv, projections, MLPs, long skips. They hold nearly all FLOPs. In bf16
stay the embedders and the readout, whose errors nothing averages out (their fan-in or fan-out does not grow with the
width, and muP scales the readout's output alone, by 1/m), and adaLN's modulations, which act on one row per image, so
that quantising their weights would cost more than their products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from megadit.config.schema.float8 import Float8Config
from megadit.models.layers.linear import MuLinear
from megadit.models.stages import Stage
from megadit.parallel.collectives import all_reduce_max
from megadit_kernels.float8 import Float8Products, TransformerEngineProducts
from megadit_kernels.linear import LinearProducts


def float8_candidates(model: nn.Module) -> Iterator[tuple[str, MuLinear]]:
    """The layers that can multiply in FP8 by their names, of a whole model or of a pipeline stage's."""
    for stage in model.modules():
        if not isinstance(stage, Stage) or not stage.is_block:
            continue
        for name, layer in stage.named_modules():
            if isinstance(layer, MuLinear) and layer.per_token and layer.param_specs["weight"].role == "hidden":
                yield stage.prefix + name, layer


def set_float8(model: nn.Module, fp8: Float8Config) -> int:
    """From now on the model's layers multiply as ``fp8`` says; returns the number of those that do so in FP8."""
    count = 0
    for name, layer in float8_candidates(model):
        if any(fnmatchcase(name, pattern) for pattern in fp8.bf16_layers):
            continue
        layer.products = float8_products(layer, fp8)
        count += 1
    return count


def float8_products(layer: MuLinear, fp8: Float8Config) -> LinearProducts:
    """How one layer multiplies; tensor-parallel ranks agree on the scales of what they share."""
    if fp8.backend == "transformer-engine":
        return TransformerEngineProducts("block" if fp8.scaling == "block" else "tensor")
    assert fp8.scaling != "block"  # held by the configuration
    if layer.layout.size == 1 or layer.sharded_axis is None:
        return Float8Products(fp8.scaling)
    agree = functools.partial(all_reduce_max, layout=layer.layout)
    return Float8Products(fp8.scaling, frozenset([layer.sharded_axis]), agree)
