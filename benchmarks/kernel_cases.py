"""Operands of every fused operation, as a block of a model gives them: for benchmarks, fake tensors and tests on a GPU.

``CASES`` has an entry for each operation of ``megadit_kernels.OPS``; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Leaves = dict[str, Any]  # tensors by name


@dataclass(frozen=True)
class Shape:
    """samples x tokens x width channels."""

    samples: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Draw:
    """Draws normal operands of ``dtype`` on ``device``; without ``values`` their shapes alone, for fake tensors."""

    dtype: torch.dtype
    device: str
    seed: int = 0
    values: bool = True

    def tensors(self) -> Callable[..., Tensor]:
        """``draw(*sizes, std=1)``, from a generator of its own, so that two of one seed draw the same."""
        import torch

        where = "cuda" if self.device == "cuda" else "cpu"  # large operands are drawn on the GPU

        def empty(*sizes: int, std: float = 1.0) -> Tensor:
            return torch.empty(*sizes, dtype=self.dtype, device=self.device)

        if not self.values:
            return empty
        generator = torch.Generator(where).manual_seed(self.seed)

        def draw(*sizes: int, std: float = 1.0) -> Tensor:
            value = torch.randn(*sizes, generator=generator, device=where) * std
            return value.to(device=self.device, dtype=self.dtype)

        return draw


@dataclass(frozen=True)
class Case:
    """``leaves(shape, draw)``: the operands by name, strided as in a model. ``call(op, leaves)``: the results.

    ``backward_reads``: names of operands that the backward pass needs, ``out0`` for the first result; the gradients of
    the results come on top. With the gradients of the operands they are the floor of bytes that it moves.
    ``in_model``: whether models call it. ``has_backward``: whether it has a backward pass of its own.
    """

    leaves: Callable[[Shape, Callable[..., Tensor]], Leaves]
    call: Callable[[Any, Leaves], Any]
    backward_reads: tuple[str, ...]
    in_model: bool = True
    has_backward: bool = True

    def results(self, op: Any, leaves: Leaves) -> tuple[Tensor, ...]:
        """What ``call`` gives, as a tuple."""
        out = self.call(op, leaves)
        return out if isinstance(out, tuple) else (out,)

    def forward_bytes(self, leaves: Leaves, results: tuple[Tensor, ...]) -> int:
        """Each operand read once, each result written once."""
        return nbytes(*leaves.values(), *results)

    def backward_bytes(self, leaves: Leaves, results: tuple[Tensor, ...]) -> int:
        """The results' gradients and what else is needed read once, the operands' gradients written once."""
        named = leaves | {f"out{index}": result for index, result in enumerate(results)}
        return nbytes(*results, *(named[name] for name in self.backward_reads), *leaves.values())


def fused_ops() -> dict[str, Any]:
    """The operations that have a kernel of this package, by name; attention has none."""
    from megadit_kernels import FUSED_KEYS, OPS_OF_KEY

    return {op.name: op for key in FUSED_KEYS for op in OPS_OF_KEY[key]}


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of all ``tensors``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def detached(leaves: Leaves, dtype: torch.dtype | None = None) -> Leaves:
    """The same values as leaves of a new graph, of ``dtype`` if given, strided as they are if not."""
    return {
        name: (leaf.detach() if dtype is None else leaf.detach().to(dtype)).requires_grad_()
        for name, leaf in leaves.items()
    }


def _modulation(shape: Shape, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """gate, shift and scale as slices of the (B, 6 n) output of adaLN."""
    gate, shift, scale = draw(shape.samples, 6 * shape.width, std=0.5).chunk(6, dim=1)[2:5]
    return gate, shift, scale


def _tokens(shape: Shape, draw: Callable[..., Tensor], width: int | None = None) -> Tensor:
    return draw(shape.samples, shape.tokens, width or shape.width)


def _residual_norm(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    gate, shift, scale = _modulation(shape, draw)
    return {
        "x": _tokens(shape, draw),
        "gate": gate,
        "branch": _tokens(shape, draw),
        "shift": shift,
        "scale": scale,
    }


def _norm(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    _, shift, scale = _modulation(shape, draw)
    return {"x": _tokens(shape, draw), "shift": shift, "scale": scale}


def _residual(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    return {"x": _tokens(shape, draw), "gate": _modulation(shape, draw)[0], "branch": _tokens(shape, draw)}


def _linear(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    n = shape.width
    return {"x": _tokens(shape, draw), "weight": draw(n, n, std=n**-0.5), "bias": draw(n)}


def _hidden(shape: Shape, draw: Callable[..., Tensor], times: int) -> Leaves:
    """What an MLP's first linear puts out without its bias, and the bias."""
    return {"h": _tokens(shape, draw, times * shape.width), "bias": draw(times * shape.width)}


def _streams(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    """Outputs of both streams' projections, of text half as many tokens as of the image, and the norms' gains."""
    d = next(d for d in (128, 72, 64, 36, 32) if shape.width % d == 0)
    heads = shape.width // d
    sizes = {"image": shape.tokens, "context": shape.tokens // 2}
    streams = {name: draw(shape.samples, tokens, 3, heads, d) for name, tokens in sizes.items()}
    return streams | {f"{which} of {name}": draw(d) for name in streams for which in "qk"}


def _norm_streams(op: Any, leaves: Leaves) -> Any:
    gains = [(leaves[f"q of {name}"], leaves[f"k of {name}"]) for name in ("image", "context")]
    return op(leaves["image"], leaves["context"], *gains)


def _heads(shape: Shape, draw: Callable[..., Tensor]) -> Leaves:
    """Queries, keys and values as they lie in a sequence of tokens."""
    d = next(d for d in (128, 72, 64, 36, 32) if shape.width % d == 0)
    size = (shape.samples, shape.tokens, shape.width // d, d)
    return {name: draw(*size).transpose(1, 2) for name in "qkv"}


def _attend(op: Any, leaves: Leaves) -> Tensor:
    """A third of each sample's rows are padding."""
    import torch

    from megadit_kernels import cumulative_lengths

    q: Tensor = leaves["q"]
    samples, _, tokens, _ = q.shape
    used = torch.full((samples,), tokens - tokens // 3, dtype=torch.int32, device=q.device)
    lengths = cumulative_lengths(used, tokens)
    out: Tensor = op(q, leaves["k"], leaves["v"], None, lengths, lengths)
    return out


def _keys(x: Tensor) -> Tensor:
    """A key per sample, all alike, so that a sample has the same noise alone."""
    import torch

    return torch.full((x.shape[0],), 7, dtype=torch.int64, device=x.device)


def _mix(op: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    """In float32 whatever x0 is, and given back in its dtype."""
    import torch

    x0 = leaves["x0"]
    level = torch.full((x0.shape[0],), 0.6, device=x0.device)
    return tuple(part.to(x0.dtype) for part in op(x0, _keys(x0), level, level, "v"))


def _noise(op: Any, leaves: Leaves) -> Tensor:
    """Added to x, which gives it a gradient."""
    x: Tensor = leaves["x"]
    return x + op(_keys(x), x.shape[1:]).to(x.dtype)


def _error(op: Any, leaves: Leaves) -> Tensor:
    error: Tensor = op(leaves["output"], leaves["target"])
    return error.to(leaves["output"].dtype)


def _bound(op: Any, leaves: Leaves) -> Tensor:
    """Of a step that is not the first; prediction and samples have the values of the variance."""
    import torch

    variance = leaves["variance"]
    given = variance.detach().float()
    coefficients = torch.full((len(given), 6), 0.5, device=given.device)
    coefficients = torch.cat([coefficients, torch.zeros(len(given), 1, device=given.device)], dim=1)
    bound: Tensor = op(variance, variance.detach(), given, given, coefficients, "v")
    return bound.to(variance.dtype)


def _positional(*names: str) -> Callable[[Any, Leaves], Any]:
    return lambda op, leaves: op(*(leaves[name] for name in names))


CASES: Mapping[str, Case] = {
    "residual_norm_modulate": Case(
        _residual_norm, _positional("x", "gate", "branch", "shift", "scale"), ("out0", "gate", "branch", "scale")
    ),
    "norm_modulate": Case(_norm, _positional("x", "shift", "scale"), ("x", "scale")),
    "gated_residual": Case(_residual, _positional("x", "gate", "branch"), ("gate", "branch")),
    "swiglu": Case(lambda shape, draw: _hidden(shape, draw, 8), _positional("h", "bias"), ("h", "bias")),
    "bias_gelu": Case(lambda shape, draw: _hidden(shape, draw, 4), _positional("h", "bias"), ("h", "bias")),
    "scaled_linear": Case(
        _linear, lambda op, leaves: op(leaves["x"], leaves["weight"], leaves["bias"], alpha=0.25), ("x", "weight")
    ),
    # Of what went in the backward pass reads queries and keys alone, as many bytes as came out of both.
    "qk_norm": Case(_streams, _norm_streams, ("out0", "out1")),
    "attention": Case(_heads, _attend, ("q", "k", "v", "out0")),
    "mix_noise": Case(lambda shape, draw: {"x0": _tokens(shape, draw)}, _mix, (), in_model=False),
    "keyed_normal": Case(
        lambda shape, draw: {"x": _tokens(shape, draw)}, _noise, (), in_model=False, has_backward=False
    ),
    "squared_error": Case(
        lambda shape, draw: {"output": _tokens(shape, draw), "target": _tokens(shape, draw)},
        _error,
        ("output", "target"),
        in_model=False,
    ),
    "variance_bound": Case(
        lambda shape, draw: {"variance": _tokens(shape, draw)}, _bound, ("variance",), in_model=False
    ),
}
