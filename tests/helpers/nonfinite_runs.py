"""Runs with a NaN, an infinite gradient or a loud sample planted in them, and the files that they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.training import layout_of
from megadit.config import RunConfig

Plant = Callable[[], None]


def nan_sample(number: int, value: float = float("nan")) -> None:
    """Data with ``value`` in the sample of this number, on whatever rank it is read."""
    from megadit.engine.loss import TrainingLoss

    plain = TrainingLoss.inputs

    def inputs(self: TrainingLoss, batch: Any, seed: int) -> Any:
        x0, cond = plain(self, batch, seed)
        x0[(batch.numbers == number).to(x0.device)] = value
        return x0, cond

    TrainingLoss.inputs = inputs  # type: ignore[method-assign]


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.inf


def infinite_gradient(number: int) -> None:
    """A finite loss with infinite gradients in the micro batch that holds the sample of this number."""
    from megadit.engine.loss import TrainingLoss

    plain = TrainingLoss.compute

    def of(self: TrainingLoss, outputs: Any, batch: Any, noisy: Any) -> Any:
        terms = plain(self, outputs, batch, noisy)
        if number in batch.numbers.tolist():
            terms = replace(terms, total=_InfiniteGradient.apply(terms.total))
        return terms

    TrainingLoss.compute = of  # type: ignore[method-assign]


def state_of(run: Any) -> dict[Any, Any]:
    """Copies of this rank's weights, moments and averages, and Adam's count of updates."""
    partitions, state = run.engine.partitions, {}
    for f in partitions.fragments():
        kinds = {"weights": f.values, **partitions.moments(f), **run.engine.ema.tensors(f)}
        state.update({(kind, f.name, f.start): values.detach().clone() for kind, values in kinds.items()})
    return {**state, "adam_step": partitions.adam_step()}


def loud_sample(number: int, factor: float) -> None:
    """A loss ``factor`` times what it is in the micro batch that holds the sample of this number."""
    from megadit.engine.loss import TrainingLoss

    plain = TrainingLoss.compute

    def of(self: TrainingLoss, outputs: Any, batch: Any, noisy: Any) -> Any:
        terms = plain(self, outputs, batch, noisy)
        return replace(terms, total=terms.total * factor) if number in batch.numbers.tolist() else terms

    TrainingLoss.compute = of  # type: ignore[method-assign]


def whole_run(
    config: RunConfig,
    folder: str,
    plant: Plant | None = None,
    ds: dict[str, Any] | None = None,
    watched: int = 3,
) -> dict[str, Any]:
    """``pretrain`` on one rank: exit code, what it printed, the step at its end, its state there and at ``watched``.

    fp16 is let through on a CPU.
    """
    from deepspeed.accelerator import get_accelerator

    from megadit.data import build_datasets
    from megadit.train.callbacks import Callback
    from megadit.train.callbacks.artifacts import Checkpoints
    from megadit.train.callbacks.logging import JsonLines, ProgressBar
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    class Watch(Callback):
        def on_start(self, run: Any) -> None:
            self.run = run

        def after_log(self, run: Any) -> None:
            if run.position.step == watched:
                self.state = state_of(run)

    get_accelerator().is_fp16_supported = lambda: True
    if plant is not None:
        plant()
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]), ds)
    job, watch = TrainingJob(config, ds_config, Path(folder), "auto", *build_datasets(config.data)), Watch()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = pretrain(job, [ProgressBar(), JsonLines(), Checkpoints(), watch], keep_group=True)
    return {
        "code": code,
        "stderr": stderr.getvalue(),
        "step": watch.run.position.step,
        "state": state_of(watch.run),
        "before": getattr(watch, "state", None),
    }


def files(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``exit.json`` and the rows of ``metrics.jsonl``, which must be plain JSON."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "exit.json").read_text(encoding="utf-8")), [
        json.loads(line, parse_constant=refuse) for line in lines
    ]
