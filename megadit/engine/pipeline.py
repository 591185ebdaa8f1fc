"""The training engine of a run whose ranks hold different stages of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config import RunConfig
from megadit.data import Batch
from megadit.diffusion import NoisyBatch
from megadit.engine.deepspeed.partitions import Partitions
from megadit.engine.deepspeed.pipeline import pipeline_engine
from megadit.engine.engine import StepResult, TrainingEngine
from megadit.engine.loss import TrainingLoss
from megadit.engine.optimizer import MuOptimizer
from megadit.engine.schedule import Schedule
from megadit.models import build_model
from megadit.models.chunk import ModelChunk
from megadit.models.stages import StageIO
from megadit.mup.spec import param_specs
from megadit.parallel import ProcessContext
from megadit.parallel.topology import ProcessGroups


class PipelineTrainingEngine(TrainingEngine):
    """``TrainingEngine`` over the chunk of a model that this rank runs.

    The first stage reads the noisy images of a micro batch and the last the targets of the loss; stages between them
    read no data. The loss is computed on the last stage only.
    """

    def __init__(
        self,
        chunk: ModelChunk,
        loss: TrainingLoss,
        config: RunConfig,
        schedule: Schedule,
        ds_config: dict[str, Any],
        context: ProcessContext,
        groups: ProcessGroups,
    ) -> None:
        self._chunk, self._groups, self._samples = chunk, groups, SampleQueue()
        super().__init__(chunk.model, loss, config, schedule, ds_config, context, groups)

    def _wrap(
        self, model: nn.Module, ds_config: dict[str, Any], groups: ProcessGroups | None
    ) -> tuple[Any, MuOptimizer, Partitions]:
        assert groups is not None
        specs = param_specs(build_model(self._config.model, device="meta"))
        device, pad = self.context.device, self._chunk.pad
        optimizer = MuOptimizer(model, self._config.optim, self._schedule, device, specs, pad)
        engine = pipeline_engine(self._chunk, self._last_stage_loss, optimizer.inner, dict(ds_config), groups.topology)
        return engine, optimizer, Partitions(engine, optimizer.clip, groups.topology, model)

    @property
    def module(self) -> nn.Module:
        """The model, in which only this rank's stages have parameters."""
        return self._chunk.model

    @property
    def reads_data(self) -> bool:
        """As ``TrainingEngine.reads_data``: on the first stage and the last."""
        return self._chunk.is_first or self._chunk.is_last

    @property
    def computes_loss(self) -> bool:
        """As ``TrainingEngine.computes_loss``: on the last stage."""
        return self._chunk.is_last

    def train_batch(self, step: int, batches: Iterable[Batch], want_norm: bool) -> StepResult:
        """As ``TrainingEngine.train_batch``; DeepSpeed's schedule takes the micro batches and runs them."""
        self.ema.publish_if_stale()
        self._chunk.project = self.loss.needs_projection
        self._samples.clear()  # of a step that an exception cut short
        return self._update(step, partial(self._engine.train_batch, self._feed(batches)), want_norm)

    def _feed(self, batches: Iterable[Batch]) -> Iterator[tuple[StageIO, tuple[Tensor, ...]]]:
        """The first stage's inputs, for DeepSpeed, which takes as many items on the last stage."""
        for batch in batches:
            noisy = self.loss.prepare(batch)
            if self._chunk.is_last:
                self._samples.put(batch, noisy)
            first = self._chunk.is_first
            yield self._chunk.model.packed_inputs(noisy.x, noisy.t, noisy.cond) if first else (), ()

    def _last_stage_loss(self, outputs: Any, _labels: Any) -> Tensor:
        return self._mean_loss(outputs, *self._samples.take())

    def _full_model(self) -> nn.Module:
        return PipelineForward(self._chunk, self._groups, self.context.device).eval()


class SampleQueue:
    """Micro batches that the last stage has been fed and whose outputs have not yet come to it.

    DeepSpeed's schedule runs micro batches in the order in which it takes them, on every stage: the outputs that come
    next are of the micro batch that has waited longest.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Batch, NoisyBatch]] = deque()

    def put(self, batch: Batch, noisy: NoisyBatch) -> None:
        """Add a micro batch that was fed."""
        self._waiting.append((batch, noisy))

    def take(self) -> tuple[Batch, NoisyBatch]:
        """The micro batch whose outputs have come."""
        return self._waiting.popleft()

    def clear(self) -> None:
        """Forget the micro batches of a step that did not end."""
        self._waiting.clear()


class PipelineForward(nn.Module):
    """Forward pass of a model in chunks: every stage calls it, and gets the output of the last stage."""

    def __init__(self, chunk: ModelChunk, groups: ProcessGroups, device: torch.device) -> None:
        super().__init__()
        self._chunk, self._device = chunk, device
        self._group, self._ranks = groups.group("pipeline"), groups.ranks("pipeline")
        self._stage = groups.topology.pipeline_rank

    def forward(
        self,
        x: Tensor | None = None,
        t: Tensor | None = None,
        cond: Conditioning | None = None,
        project: bool = False,
    ) -> Any:
        """As ``StagedModel.forward``; x and t are used on the first stage only (all stages must call)."""
        chunk, ranks = self._chunk, self._ranks
        chunk.project = project
        if chunk.is_first:
            assert x is not None and t is not None
            stage_io = chunk.model.packed_inputs(x, t, Conditioning() if cond is None else cond)
        else:
            stage_io = self._receive(ranks[self._stage - 1])
        outputs = chunk(stage_io)
        tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not chunk.is_last:
            self._send(tensors, ranks[self._stage + 1])
        outputs = self._broadcast_from_last(tensors if chunk.is_last else ())
        return outputs if project else outputs[0]

    def _send(self, tensors: StageIO, rank: int) -> None:
        dist.send_object_list([_shapes(tensors)], rank, group=self._group, device=self._device)
        for tensor in tensors:
            dist.send(tensor.contiguous(), rank, group=self._group)

    def _receive(self, rank: int) -> StageIO:
        shapes: list[Any] = [None]
        dist.recv_object_list(shapes, rank, group=self._group, device=self._device)
        tensors = self._empty(shapes[0])
        for tensor in tensors:
            dist.recv(tensor, rank, group=self._group)
        return tensors

    def _broadcast_from_last(self, tensors: StageIO) -> StageIO:
        source = self._ranks[-1]
        shapes: list[Any] = [_shapes(tensors)]
        dist.broadcast_object_list(shapes, source, group=self._group, device=self._device)
        tensors = tuple(tensor.contiguous() for tensor in tensors) or self._empty(shapes[0])
        for tensor in tensors:
            dist.broadcast(tensor, source, group=self._group)
        return tensors

    def _empty(self, shapes: list[Any]) -> StageIO:
        return tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in shapes)


def _shapes(tensors: StageIO) -> list[Any]:
    """Shape and dtype of each tensor, which a rank needs before it can receive them."""
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
