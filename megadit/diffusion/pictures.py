"""Pictures from a model: samples in batches, decoded to 8 bits, and laid out as a grid by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.run import RunConfig
from megadit.data.latents import Codec
from megadit.diffusion.grid import grid_columns, save_grid, to_uint8
from megadit.diffusion.sampling import sample

MOST_COLUMNS = 16  # up to this many classes, each gets a column of its own
MOST_TILES = 1024  # a sheet of more could not be looked at; the npz of launch/sample.py holds them all


def grid_labels(classes: int, count: int) -> list[int]:
    """The classes shown by a grid of ``count`` pictures: all in turn, or, if too many, an even choice of them."""
    if classes <= count:
        return [number % classes for number in range(count)]
    return [number * classes // count for number in range(count)]


def sample_pictures(
    model: nn.Module,
    config: RunConfig,
    codec: Codec,
    *,
    labels: Sequence[int] | None,
    numbers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Tensor:
    """Draw pictures: uint8 (N, C, H, W) on the CPU.

    numbers: which, default 0...``config.sample.count`` - 1 (ranks may each draw their share).  labels: picture i shows
    class labels[i mod len]; None for an unconditional model. Picture i depends on ``config.sample.seed``, i and its
    label only. Raises UserError as ``megadit.diffusion.sampling.sample`` does.
    """
    wanted = range(config.sample.count) if numbers is None else numbers
    pictures = []
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        cond, null_cond = _conditions(config, labels, part)
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


def sample_grid(
    model: nn.Module,
    config: RunConfig,
    codec: Codec,
    classes: Sequence[str],
    out_path: Path,
    device: torch.device | str = "cpu",
    *,
    labels: Sequence[int] | None = None,
    notice: str = "",
) -> Path:
    """Sample ``config.sample.count`` pictures and write their grid, with class names where there are classes.

    classes: names by label; may be empty.  labels: the classes to show, in turn; default ``grid_labels``.
    notice: attribution, written below the grid. Returns ``out_path``.
    """
    labels = picture_labels(config, labels)
    pictures = sample_pictures(model, config, codec, labels=labels, device=device)
    return save_labelled_grid(pictures, labels, classes, out_path, notice=notice)


def picture_labels(config: RunConfig, labels: Sequence[int] | None = None) -> list[int] | None:
    """The label of every picture of a run's grid; None for an unconditional model."""
    count, classes = config.sample.count, config.model.num_classes
    if classes == 0:
        return None
    if labels is None:
        return grid_labels(classes, count)
    return [labels[number % len(labels)] for number in range(count)]


def save_labelled_grid(
    pictures: Tensor, labels: Sequence[int] | None, classes: Sequence[str], path: Path, *, notice: str = ""
) -> Path:
    """Write (the first 1024) pictures as a grid: a titled column per class where the labels go round, else a caption
    under each.
    """
    pictures = pictures[:MOST_TILES]
    if labels is None:
        return save_grid(pictures, path, footer=notice)
    labels = labels[:MOST_TILES]
    names = [classes[label] if label < len(classes) else str(label) for label in labels]
    period = _period(labels)
    if period is not None:
        # Repeated until the sheet is about square, so that a few classes do not make one long column.
        columns = min(period * max(1, grid_columns(len(labels)) // period), len(labels))
        return save_grid(pictures, path, columns=columns, titles=names[:columns], footer=notice)
    return save_grid(pictures, path, captions=names, footer=notice)


def _period(labels: Sequence[int]) -> int | None:
    """The smallest p such that the labels repeat every p pictures; None if there is none small enough for columns."""
    for period in range(1, MOST_COLUMNS + 1):
        if all(a == b for a, b in zip(labels, labels[period:], strict=False)):
            return period
    return None


def _conditions(
    config: RunConfig, labels: Sequence[int] | None, numbers: Sequence[int]
) -> tuple[Conditioning, Conditioning | None]:
    """Conditions of these pictures, and the null ones if the model has learned them."""
    if labels is None:
        return Conditioning(), None
    chosen = torch.tensor([labels[number % len(labels)] for number in numbers], dtype=torch.int64)
    null = torch.full_like(chosen, config.model.num_classes) if config.objective.label_dropout > 0 else None
    return Conditioning(labels=chosen), None if null is None else Conditioning(labels=null)
