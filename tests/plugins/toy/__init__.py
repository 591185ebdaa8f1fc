"""A plugin with one of every kind: families (one with a fault), a data source, codec, schedule, callback and metric.

Nothing here imports torch before it is used.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from megadit.config.data_source import DataSource
from megadit.config.family import FamilySpec
from megadit.evaluate.metrics import Metric
from megadit.extensions import CALLBACKS, CODECS, DATA_SOURCES, FAMILIES, METRICS, SCHEDULES
from megadit.train.callbacks import Callback

if TYPE_CHECKING:
    from megadit.config.schema.data import DataConfig
    from megadit.data.dataset import ArraySet
    from megadit.engine.schedule import Schedule
    from megadit.train.run import TrainingRun

__version__ = "1.0"


def family(name: str, model: str) -> FamilySpec:
    """A mixer of pooled tokens: see ``model``."""
    return FamilySpec(
        name=name,
        model=f"toy.model:{model}",
        init={"original": "megadit.mup.rules:FAN_IN_SCHEME"},  # it has no other start
        presets={"toy-s": {"width": 64, "depth": 2, "head_dim": 16}} if name == "toy" else {},
        options={"pool": 1.0} if name == "toy" else {},
        layouts=("tensor", "pipeline"),
    )


def load_stripes(config: DataConfig, num_classes: int | None) -> ArraySet:
    """64 grey pictures of 8 x 8: stripes that lie or stand, at a brightness of their own."""
    import torch

    from megadit.data.dataset import ArraySet

    labels = torch.arange(64) % 2
    rows = torch.zeros(8, 8)
    rows[::2] = 1
    levels = torch.linspace(0.5, 1, 64)[:, None, None]
    pictures = torch.where((labels == 0)[:, None, None], rows, rows.T) * levels * 255
    classes = ("lying", "standing")
    return ArraySet(
        name="stripes",
        classes=classes,
        image_size=config.image_size or 8,
        notice="",
        images=pictures.to(torch.uint8)[:, None],
        labels=labels,
        captions=tuple(f"{classes[i]} stripes" for i in labels.tolist()),
        bases=tuple(map(str, range(64))),
    )


def inverse_sqrt(step: int, schedule: Schedule) -> float:
    """The first update after the warm-up has 1."""
    return float(max(schedule.floor, (step - schedule.warmup + 1) ** -0.5))


class Countdown(Callback):
    """Adds to each record how many steps are left."""

    def on_step(self, run: TrainingRun) -> dict[str, Any]:
        """``steps_left``."""
        return {"steps_left": run.total_steps - run.position.step}


class Brightness(Metric):
    """Of pictures that ``launch/sample.py --npz`` wrote."""

    help = "mean grey level of the pictures"
    keys = "brightness"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The pictures."""
        parser.add_argument("pictures", metavar="FILE.npz")

    def compute(self, args: argparse.Namespace) -> dict[str, Any]:
        """0 to 255."""
        from pathlib import Path

        from megadit.evaluate.pictures import read_pictures

        return {"brightness": read_pictures(Path(args.pictures)).float().mean().item()}


def register() -> None:
    """Add them all."""
    FAMILIES.add("toy", family("toy", "Toy"))
    FAMILIES.add("toy-faulty", family("toy-faulty", "FaultyToy"))
    CODECS.add("BlockMeans", "toy.codec:BlockMeans")
    DATA_SOURCES.add("stripes", DataSource(load_stripes, own_classes=True))
    SCHEDULES.add("inverse-sqrt", inverse_sqrt)
    CALLBACKS.add("countdown", Countdown)
    METRICS.add("brightness", Brightness)
