"""The training engine of a run whose ranks hold different stages of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config import OptimConfig
from megadit.config.schema.run import EmaConfig
from megadit.engine.deepspeed.partitions import Partitions
from megadit.engine.deepspeed.pipeline import pipeline_engine
from megadit.engine.engine import Sample, TrainingEngine
from megadit.engine.optimizer import MuOptimizer
from megadit.engine.schedule import Schedule
from megadit.models.chunk import ModelChunk
from megadit.models.stages import Carrier
from megadit.mup.spec import ParamSpec
from megadit.parallel import ProcessContext
from megadit.parallel.topology import Groups


class PipelineTrainingEngine(TrainingEngine):
    """``TrainingEngine`` over the segment of a model that this rank runs; ``specs`` are the whole model's.

    The first stage takes the noisy images from a micro batch and the last what the loss needs; stages between them
    never draw one. The loss, and whatever is called in it, is computed on the last stage only.
    """

    def __init__(
        self,
        segment: ModelChunk,
        specs: Mapping[str, ParamSpec],
        optim: OptimConfig,
        schedule: Schedule,
        ds_config: dict[str, Any],
        context: ProcessContext,
        groups: Groups,
        ema: EmaConfig | None = None,
    ) -> None:
        self._segment, self._specs = segment, specs
        self._groups = groups
        self._waiting: deque[Sample] = deque()
        self._loss: Callable[..., Tensor] | None = None
        super().__init__(segment.model, optim, schedule, ds_config, context, ema, groups)

    def _wrap(
        self, model: nn.Module, optim: OptimConfig, schedule: Schedule, ds_config: dict[str, Any], groups: Groups | None
    ) -> tuple[Any, MuOptimizer, Partitions]:
        assert groups is not None
        device = self.context.device
        optimizer = MuOptimizer(model, optim, schedule, device, self._specs, self._segment.pad)
        engine = pipeline_engine(self._segment, self._last_loss, optimizer.inner, dict(ds_config), groups.topology)
        return engine, optimizer, Partitions(engine, optimizer.clip, groups.topology, model)

    @property
    def module(self) -> nn.Module:
        """The model, with nothing in it but what this rank's stages own."""
        return self._segment.model

    @property
    def reads_data(self) -> bool:
        """As ``TrainingEngine.reads_data``: on the first stage and the last."""
        return self._segment.is_first or self._segment.is_last

    @property
    def computes_loss(self) -> bool:
        """As ``TrainingEngine.computes_loss``: on the last stage."""
        return self._segment.is_last

    def train_step(
        self, step: int, micro_batches: Iterable[Sample], loss: Callable[..., Tensor], want_norm: bool
    ) -> float | None:
        """As ``TrainingEngine.train_step``; ``loss`` is called on the last stage only."""
        self.ema.settle()
        self._loss = loss
        self._segment.project = self._segment.model.repa_block > 0
        feed = self._feed(micro_batches)
        norm = self._update(step, lambda: self._engine.train_batch(feed), want_norm)
        self._waiting.clear()
        return norm

    def _feed(self, micro_batches: Iterable[Sample]) -> Iterator[tuple[Carrier, tuple[Tensor, ...]]]:
        for batch, noisy in micro_batches:
            if self._segment.is_last:
                self._waiting.append((batch, noisy))
            first = self._segment.is_first
            yield self._segment.model.carrier(noisy.x, noisy.t, noisy.cond) if first else (), ()

    def _last_loss(self, outputs: Any, _labels: Any) -> Tensor:
        """The loss of the micro batch whose turn it is: the last stage runs them in the order in which it gets them."""
        assert self._loss is not None
        batch, noisy = self._waiting.popleft()
        return self.watched(self._loss(lambda *_args, **_kwargs: outputs, batch, noisy))

    def _callable(self) -> Any:
        return _Passage(self._segment, self._groups, self.context.device).eval()


class _Passage(nn.Module):
    """A segmented model as a function of whole inputs: every stage calls it alike and gets the last one's output."""

    def __init__(self, segment: ModelChunk, groups: Groups, device: torch.device) -> None:
        super().__init__()
        self._segment, self._device = segment, device
        self._group, self._ranks = groups.group("pipeline"), groups.ranks("pipeline")
        self._place = groups.topology.pipeline_rank

    def forward(
        self,
        x: Tensor | None = None,
        t: Tensor | None = None,
        cond: Conditioning | None = None,
        project: bool = False,
    ) -> Any:
        """As ``StagedModel.forward``; x and t are looked at on the first stage only."""
        segment, ranks = self._segment, self._ranks
        segment.project = project
        if segment.is_first:
            assert x is not None and t is not None
            wire = segment.model.carrier(x, t, Conditioning() if cond is None else cond)
        else:
            wire = self._receive(ranks[self._place - 1])
        outputs = segment(wire)
        tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not segment.is_last:
            self._send(tensors, ranks[self._place + 1])
        found = self._from_last(tensors if segment.is_last else ())
        return found if project else found[0]

    def _send(self, tensors: Carrier, rank: int) -> None:
        import torch.distributed as dist

        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        dist.send_object_list([kinds], rank, group=self._group, device=self._device)
        for tensor in tensors:
            dist.send(tensor.contiguous(), rank, group=self._group)

    def _receive(self, rank: int) -> Carrier:
        import torch.distributed as dist

        box: list[Any] = [None]
        dist.recv_object_list(box, rank, group=self._group, device=self._device)
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in box[0])
        for tensor in tensors:
            dist.recv(tensor, rank, group=self._group)
        return tensors

    def _from_last(self, tensors: Carrier) -> Carrier:
        import torch.distributed as dist

        source = self._ranks[-1]
        box: list[Any] = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
        dist.broadcast_object_list(box, source, group=self._group, device=self._device)
        if not tensors:
            tensors = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in box[0])
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        for tensor in tensors:
            dist.broadcast(tensor, source, group=self._group)
        return tensors
