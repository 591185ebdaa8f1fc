"""DeepSpeed's pipeline engine around a chunk of a model.

Measured facts of DeepSpeed 0.19 that shape it:

* ZeRO 1 is the only stage that is correct with pipelines: 2 and 3 are refused, 0 clips by a norm without the other
  pipeline stages.
* A message of several tensors must not be partitioned between tensor-parallel ranks.
* Buffers of gradients are found by size alone, whatever their dtype, and a wrong one is used without an error.
* A stage runs one backward pass for each tensor that it sent, through all of its layers, which costs a multiple and
  fails for blocks that are recomputed selectively.
* ``PipelineModule`` prints its plan.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megadit.engine.deepspeed.grad_accumulation import force_zero_optimizer
from megadit.parallel.topology import Topology


def pipeline_engine(
    chunk: nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    ds_config: dict[str, Any],
    topology: Topology,
) -> Any:
    """The ``PipelineEngine`` of a rank that runs ``chunk``; ``loss(outputs, labels)`` is called on the last stage."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed()  # wraps the process group, which the module below needs before the engine does
    axes = PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data)
    # One layer per stage: the model is cut already, and other ranks' chunks are not built here.
    layers = [chunk if stage == topology.pipeline_rank else nn.Identity() for stage in range(topology.pipeline)]
    with contextlib.redirect_stdout(io.StringIO()), force_zero_optimizer():
        module = PipelineModule(layers, topology=axes, loss_fn=loss, partition_method="uniform")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    engine._allocate_or_extend_buffers = lambda _index, shape, dtype: engine._allocate_zeros(shape, dtype=dtype)
    _JointBackward(engine)
    return engine


class _JointBackward:
    """Patch of a ``PipelineEngine``: one backward pass from all tensors that a stage sent, instead of one from each."""

    def __init__(self, engine: Any) -> None:
        from deepspeed.runtime.pipe.schedule import BackwardPass

        self._engine, self._original = engine, engine._exec_backward_pass
        # The schedule's instructions are looked up in this map of functions, and not by name.
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: self._exec_backward_pass}

    def _exec_backward_pass(self, _engine: Any, buffer_id: int) -> None:
        engine = self._engine
        outputs, gradients = engine.pipe_buffers["outputs"][buffer_id], engine.grad_layer
        if engine.is_last_stage() or not isinstance(outputs, tuple):
            self._original(buffer_id)
            return
        joint = _Joint.apply(tuple(gradients), *(tensor for tensor in outputs if tensor.is_floating_point()))
        engine.pipe_buffers["outputs"][buffer_id], engine.grad_layer = joint, torch.ones_like(joint)
        try:
            self._original(buffer_id)
        finally:
            engine.grad_layer = gradients  # its buffers take the gradients of the next micro batch


class _Joint(torch.autograd.Function):
    """A zero whose gradient is that of several tensors: ``apply(gradients, *tensors)``."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[torch.Tensor, ...], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients
