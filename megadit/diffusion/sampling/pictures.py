"""Samples images in batches, decodes them to 8 bits, and lays them out as a grid by class or prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning, null_label
from megadit.config.schema.run import RunConfig
from megadit.data.codecs.codec import Codec
from megadit.data.dataset import evenly_spaced
from megadit.diffusion.sampling.grid import grid_columns, save_grid, to_uint8
from megadit.diffusion.sampling.sample import sample

MOST_COLUMNS = 16  # up to this many classes or prompts, each gets a column of its own
MOST_TILES = 1024  # of a grid; the npz of launch/sample.py holds all images


@dataclass(frozen=True)
class Subjects:
    """K classes or prompts to sample: image i has the subject i mod K.

    cond: conditions of the K subjects; empty for an unconditional model.  null: the null conditions, a batch of one;
    None where the model was not trained with them.  names: labels of the K subjects in grids; empty without conditions.
    """

    cond: Conditioning
    null: Conditioning | None = None
    names: tuple[str, ...] = ()

    def of(self, numbers: Sequence[int]) -> tuple[Conditioning, Conditioning | None]:
        """Conditions of the images ``numbers``, and null conditions of the same batch size."""
        count = self.cond.batch_size
        if count is None:
            return Conditioning(), None
        chosen = self.cond[[number % count for number in numbers]]
        all_samples = torch.ones(len(numbers), dtype=torch.bool)
        return chosen, None if self.null is None else chosen.dropped(all_samples, self.null)

    def names_of(self, count: int) -> list[str]:
        """The names of the first ``count`` images; empty without names."""
        return [self.names[number % len(self.names)] for number in range(count)] if self.names else []

    def labels_of(self, count: int) -> list[int] | None:
        """The labels of the first ``count`` images; None where subjects are no classes."""
        labels = self.cond.labels
        return None if labels is None else [int(labels[number % len(labels)]) for number in range(count)]

    def prompts_of(self, count: int) -> list[str] | None:
        """The prompts of the first ``count`` images; None where subjects are no texts."""
        return None if self.cond.text is None else self.names_of(count)


def class_subjects(config: RunConfig, classes: Sequence[str], labels: Sequence[int] | None = None) -> Subjects:
    """Classes as subjects; none for an unconditional model.

    classes: names by label; may be empty.  labels: the classes to sample; default ``grid_labels`` of all.
    """
    if config.model.num_classes == 0:
        return Subjects(Conditioning())
    if labels is None:
        labels = grid_labels(config.model.num_classes, config.sample.count)
    names = tuple(classes[label] if label < len(classes) else str(label) for label in labels)
    null = null_label(config.model.num_classes) if config.objective.label_dropout > 0 else None
    return Subjects(Conditioning(labels=torch.tensor(labels, dtype=torch.int64)), null, names)


def text_subjects(config: RunConfig, texts: Sequence[str], cond: Conditioning, null: Conditioning | None) -> Subjects:
    """Prompts as subjects. cond: their features.  null: those of the null caption."""
    return Subjects(cond, null if config.objective.label_dropout > 0 else None, tuple(texts))


def grid_labels(classes: int, count: int) -> list[int]:
    """The classes of a grid of ``count`` images: all, or where they are more, evenly spaced ones."""
    return evenly_spaced(range(classes), count)


def sample_pictures(
    model: nn.Module,
    config: RunConfig,
    codec: Codec,
    *,
    subjects: Subjects,
    numbers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Tensor:
    """Sample images: uint8 (N, C, H, W) on the CPU.

    numbers: image numbers, default 0...``config.sample.count`` - 1; ranks may each sample a share. Image i depends on
    ``config.sample.seed``, i and its subject only. Raises UserError as ``megadit.diffusion.sampling.sample`` does.
    """
    numbers = range(config.sample.count) if numbers is None else numbers
    pictures = []
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        cond, null_cond = subjects.of(part)
        latents = sample(
            model,
            config.model,
            config.objective,
            config.sample,
            numbers=part,
            cond=cond,
            null_cond=null_cond,
            device=device,
        )
        pictures.append(to_uint8(codec.decode(latents)))
    return torch.cat(pictures)


def save_subject_grid(pictures: Tensor, subjects: Subjects, path: Path, *, notice: str = "") -> Path:
    """Write the first 1024 images as a grid and return ``path``.

    Where the subjects repeat, each has a titled column whose rows differ by their noise; else each image has a caption.
    notice: attribution, written below the grid.
    """
    pictures = pictures[:MOST_TILES]
    names = subjects.names_of(len(pictures))
    if not names:
        return save_grid(pictures, path, footer=notice)
    period = _period(names)
    if period is not None:
        # Columns are repeated until the grid is about square.
        columns = min(period * max(1, grid_columns(len(names)) // period), len(names))
        return save_grid(pictures, path, columns=columns, titles=names[:columns], footer=notice)
    return save_grid(pictures, path, captions=names, footer=notice)


def _period(names: Sequence[str]) -> int | None:
    """The smallest p up to ``MOST_COLUMNS`` such that the names repeat every p images; None if there is none."""
    for period in range(1, MOST_COLUMNS + 1):
        if all(a == b for a, b in zip(names, names[period:], strict=False)):
            return period
    return None
