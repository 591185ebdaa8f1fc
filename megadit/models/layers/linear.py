"""The layers that own parameters: each declares its global dims and gets its specs when it is built."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megadit.models.layers.column_linear import column_linear
from megadit.mup.rules import InitRule, Parametrization, Purpose
from megadit.mup.spec import Dim, ParamSpec, Role
from megadit.parallel.collectives import (
    copy_to_ranks,
    gather_channels,
    sum_and_scatter_tokens,
    sum_over_ranks,
)
from megadit.parallel.tensor import Shard, TensorLayout, cut, mark_shards, tensor_layout
from megadit.slices import Boxes
from megadit_kernels import scaled_linear


class MuLinear(nn.Module):
    """``y = mult * W x + b``: W (out, in), b (out,); mult is the role's forward multiplier.

    Not an ``nn.Linear``, so that the mup package neither rescales it nor asks for its own readout class.

    What a tensor-parallel rank holds and does (Megatron-LM, arXiv 1909.08053 section 3 and 2205.05198 section 4.2):

    * ``shard`` column: a share of the outputs, from the whole input; ``parts`` matrices side by side are cut each by
      itself; with ``gather`` every rank gets all outputs, to use on what it holds of the tokens. ``entered``: several
      layers have this input, and ``enter_blocks`` sums its gradient for all of them.
    * row: a share of the inputs, as a column layer puts it out; the ranks' products are summed, then the bias added.
      With ``parts`` the weight is a stack of pieces (``cut``).
    * gathered: a share of the outputs' weights, which are gathered where they are used (``SkipLinear``).
    * none: everything.

    ``tokens``: the input (B, T, n) is a stream of T tokens, which sequence parallelism cuts between the ranks outside
    of pairs of column and row layers; None: it is never cut.
    """

    def __init__(
        self,
        in_dim: Dim,
        out_dim: Dim,
        param: Parametrization,
        *,
        bias: bool = True,
        init: Purpose | InitRule = "linear",
        bias_init: Purpose | InitRule = "zero",
        role: Role | None = None,
        shard: Shard = "none",
        parts: int = 1,
        gather: bool = False,
        entered: bool = False,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_dim.size, out_dim.size
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((out_dim, in_dim), init, role=role)}
        self.shard: Shard = shard
        self.gather, self.entered = gather, entered
        layout = tensor_layout()
        self.layout = layout if layout.size > 1 else None
        self.tokens = tokens if layout.sequence else None
        self.param_boxes: dict[str, Boxes] = {}
        shape: tuple[int, ...] = (out_dim.size, in_dim.size)
        bias_shape: tuple[int, ...] = (out_dim.size,)
        if self.layout is not None and shard != "none":
            shape, self.param_boxes["weight"] = cut(shape, layout, 1 if shard == "row" else 0, parts)
            if bias and shard == "column":
                bias_shape, self.param_boxes["bias"] = cut(bias_shape, layout, 0, parts)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(bias_shape)) if bias else None
        if bias:
            self.param_specs["bias"] = param.spec((out_dim,), bias_init)
        mark_shards(self)

    @property
    def forward_mult(self) -> float:
        """The multiplier on the layer's input."""
        return self.param_specs["weight"].forward_mult

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), of which a column layer that does not gather puts out the rank's share."""
        if self.layout is None:
            return scaled_linear(x, self.weight, self.bias, self.forward_mult)
        if self.shard == "column":
            return self._columns(x, self.layout)
        if self.shard == "row":
            return self._rows(x, self.layout)
        return self._on_own_tokens(x, self.layout)

    def _columns(self, x: Tensor, layout: TensorLayout) -> Tensor:
        if self.entered:
            out = scaled_linear(x, self.weight, self.bias, self.forward_mult)
        else:
            out = column_linear(x, self.weight, self.bias, self.forward_mult, layout, self.tokens)
        return gather_channels(out, layout, partial=layout.sequence) if self.gather else out

    def _rows(self, x: Tensor, layout: TensorLayout) -> Tensor:
        product = scaled_linear(x, self.weight, None, self.forward_mult)
        bias: Tensor | None = self.bias
        if self.tokens is None:
            out = sum_over_ranks(product, layout)
        else:
            out = sum_and_scatter_tokens(product, layout)
            bias = None if bias is None else copy_to_ranks(bias, layout)
        return out if bias is None else out + bias

    def _on_own_tokens(self, x: Tensor, layout: TensorLayout) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.tokens is not None:  # each rank sees its own tokens, and gradients of whole parameters are sums
            weight = copy_to_ranks(weight, layout)
            bias = None if bias is None else copy_to_ranks(bias, layout)
        return scaled_linear(x, weight, bias, self.forward_mult)

    def extra_repr(self) -> str:
        spec = self.param_specs["weight"]
        return f"{self.in_features}, {self.out_features}, role={spec.role}, mult={spec.forward_mult:g}"


class MuPatchProjection(nn.Module):
    """Non-overlapping p x p patches to tokens: a strided convolution, computed as one GEMM.

    Weight (n, C, p, p) as in a convolution, bias (n,). An input layer of fan-in C p^2.
    """

    def __init__(self, channels: int, out_dim: Dim, patch: int, param: Parametrization) -> None:
        super().__init__()
        self.patch = patch
        dims = (out_dim, Dim(channels), Dim(patch), Dim(patch))
        self.param_specs: dict[str, ParamSpec] = {
            "weight": param.spec(dims, "patch"),
            "bias": param.spec((out_dim,), "patch_bias", drawn_fan_in=channels * patch * patch),
        }
        self.weight = nn.Parameter(torch.empty(out_dim.size, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(out_dim.size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, n), tokens row-major."""
        b, c, h, w = x.shape
        p = self.patch
        patches = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(b, (h // p) * (w // p), c * p * p)
        return scaled_linear(patches, self.weight.flatten(1), self.bias, self.param_specs["weight"].forward_mult)


class MuEmbedding(nn.Module):
    """A table (entries, n) whose rows are looked up; the role's multiplier scales the row that comes out."""

    def __init__(self, entries: int, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((Dim(entries), dim), "table", table=True)}
        self.weight = nn.Parameter(torch.empty(entries, dim.size))

    def forward(self, index: Tensor) -> Tensor:
        """int64 (B,) -> (B, n)."""
        row = F.embedding(index, self.weight)
        mult = self.param_specs["weight"].forward_mult
        return row if mult == 1.0 else row * mult


class MuTokens(nn.Module):
    """Learned vectors (1, count, n) that are added to tokens or stand among them (positions, registers)."""

    def __init__(self, count: int, dim: Dim, param: Parametrization) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((Dim(1), Dim(count), dim), "tokens", table=True)}
        self.weight = nn.Parameter(torch.empty(1, count, dim.size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add them: (B, count, n) -> (B, count, n)."""
        mult = self.param_specs["weight"].forward_mult
        return torch.add(tokens, self.weight.to(tokens.dtype), alpha=mult)
