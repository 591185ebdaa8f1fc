"""What a coordinate check measures on one model: sizes of coordinates on a fixed probe, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from megadit.mup.spec import ParamSpec
from megadit.parallel.tensor import UNSHARDED, TensorLayout

OUTPUT = "output"  # the model's own result, as a module of that name
PROJECTOR = "repa"


@dataclass(frozen=True)
class CoordMeasurement:
    """One number. ``quantity``: see ``Recorder``; ``role``: that of a layer's weight, else block or output."""

    width: int
    seed: int
    step: int
    module: str
    role: str
    quantity: str
    value: float


def watched_modules(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """(module, role) by name, in execution order of the definition: all layers with parameters, blocks, the model."""
    watched: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if getattr(module, "is_block", False):
            watched[name] = (module, "block")
        specs: Mapping[str, ParamSpec] = getattr(module, "param_specs", {})
        if specs and name not in watched:
            weight = specs.get("weight") or next(iter(specs.values()))
            watched[name] = (module, weight.role)
    watched[OUTPUT] = (model, OUTPUT)
    return watched


def _first_tensor(value: Any) -> Tensor:
    """The tensor that a module puts out; a block's packed state begins with its tokens."""
    return value[0] if isinstance(value, tuple) else value


def _mean_abs(value: Tensor) -> Tensor:
    """Mean absolute coordinate, of float64."""
    return value.detach().abs().mean(dtype=torch.float64)


class Recorder:
    """Coordinate sizes of one model as it trains, against its start. Sizes are mean absolute coordinates on the probe.

    Of every module, ``activation``: the output; ``change``: the output minus that at step 0. Of a layer, so
    that it tells of this layer and not of those before it, ``gain``: the output at step 0, without a bias that was
    drawn, over the input (of a norm, the output alone); and of each of its parameters p, ``update.p``: how much p's own
    training moves the output at the present input (the output minus that with p as it was at step 0), for a matrix over
    the size of the input. A parameter beside layers, in a block say, is a table that is added inside: ``update.p`` is
    how far it moved itself, so that a fault of those layers does not show there.

    Of a model whose layers tensor-parallel ranks share, sizes are means over the ranks: of equal shares of the
    coordinates, or of the same coordinates again. All ranks must record together. Sequence parallelism is refused: its
    padding would be measured too.
    """

    def __init__(self, model: nn.Module, probe: Callable[[], Tensor], width: int, seed: int) -> None:
        """``probe`` runs the model on the fixed probe batch and returns its output."""
        self.model, self.probe, self.width, self.seed = model, probe, width, seed
        self.layout: TensorLayout = getattr(model, "layout", UNSHARDED)
        if self.layout.sequence:
            raise ValueError("coordinates are not read under sequence parallelism, whose padding would be among them")
        self.watched = watched_modules(model)
        self.initial = {
            name: {key: param.detach().clone() for key, param in module.named_parameters(recurse=False)}
            for name, (module, _) in self.watched.items()
        }
        self.initial_outputs: dict[str, Tensor] = {}
        self.measurements: list[CoordMeasurement] = []
        # Measured on this rank: (step, module, role, quantity), the size, and the size that it is divided by.
        self._pending: list[tuple[tuple[int, str, str, str], Tensor, Tensor]] = []

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Measure after ``step`` optimizer steps; the first call must be step 0."""
        inputs, outputs = self._run_probe()
        for name, (_, role) in self.watched.items():
            out = outputs[name]
            self._add(step, name, role, "activation", out)
            if step == 0:
                self.initial_outputs[name] = out.clone()  # what puts out its parameter would move with it
            else:
                self._add(step, name, role, "change", out - self.initial_outputs[name])
            if self.initial[name]:
                self._record_layer(step, name, inputs[name], out)
        self._all_reduce()

    def record_pull(self, step: int, gradient: Tensor) -> None:
        """Of the projector, ``pull``: the REPA loss's gradient at the tokens that it projects, times the width.

        Entries of size 1 have gradients of size 1/n wherever they decide anything of size 1, so that Adam, which
        takes every gradient at its share of the sum, weighs REPA against the objective alike at every width.
        """
        self._add(step, PROJECTOR, "output", "pull", self.width * gradient)
        self._all_reduce()

    def _record_layer(self, step: int, name: str, args: tuple[Any, ...], out: Tensor) -> None:
        """Gain or updates of one layer, from its input and output on the probe."""
        module, role = self.watched[name]
        if next(module.children(), None) is not None:
            for key, initial in self.initial[name].items() if step else ():
                self._add(step, name, role, f"update.{key}", module.get_parameter(key) - initial)
            return
        # A norm's output does not follow its input's size, so that a gain would blame it for the layer before.
        inputs = args if any(initial.dim() > 1 for initial in self.initial[name].values()) else ()
        if step == 0:
            drawn = {key: torch.zeros_like(p) for key, p in self.initial[name].items() if p.dim() == 1 and p.any()}
            if inputs and drawn:  # of fixed size beside an input that may shrink, as a random readout's output does
                out = _first_tensor(functional_call(module, drawn, args))
            self._add(step, name, role, "gain", out, inputs)
            return
        for key, initial in self.initial[name].items():
            old = _first_tensor(functional_call(module, {key: initial}, args))
            self._add(step, name, role, f"update.{key}", out - old, inputs if initial.dim() > 1 else ())

    def _add(self, step: int, name: str, role: str, quantity: str, value: Tensor, inputs: tuple[Any, ...] = ()) -> None:
        """The size of ``value``, over that of ``inputs``: 1 where none is of floating point, or all are 0."""
        by = value.new_zeros((), dtype=torch.float64)
        sizes = [_mean_abs(part) for part in inputs if part.is_floating_point()]
        if sizes:  # of a long skip the mean of both halves
            by = torch.stack(sizes).mean()
        self._pending.append(((step, name, role, quantity), _mean_abs(value), by))

    def _all_reduce(self) -> None:
        """Append the pending measurements, averaged over ranks by one all-reduce; each has as much of all."""
        sizes = torch.stack([size for _, *sizes in self._pending for size in sizes])
        if self.layout.size > 1:
            dist.all_reduce(sizes, group=self.layout.group)
        means = (sizes / self.layout.size).view(-1, 2).tolist()
        for (key, _, _), (value, by) in zip(self._pending, means, strict=True):
            self.measurements.append(CoordMeasurement(self.width, self.seed, *key, value / (by or 1.0)))
        self._pending.clear()

    def _run_probe(self) -> tuple[dict[str, tuple[Any, ...]], dict[str, Tensor]]:
        """One forward pass; positional inputs and outputs of every watched module.

        A layer that takes an activation is run again without: its coordinates are those before the activation.
        """
        inputs: dict[str, tuple[Any, ...]] = {}
        outputs: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def record_call(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                operands = tuple(arg for arg in args if not callable(arg))
                if len(operands) < len(args):
                    result = module.forward(*operands)
                inputs[name], outputs[name] = operands, _first_tensor(result)

            return record_call

        handles = [
            module.register_forward_hook(hook(name)) for name, (module, _) in self.watched.items() if name != OUTPUT
        ]
        try:
            outputs[OUTPUT] = self.probe()
        finally:
            for handle in handles:
                handle.remove()
        return inputs, outputs
