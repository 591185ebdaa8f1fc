"""``DataSource``: the description of a data source, chosen by ``data.name``, without importing its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megadit.config.options import Scalar

if TYPE_CHECKING:
    from megadit.config.schema.data import DataConfig


def _no_check(config: DataConfig) -> None:
    """``check`` of a source that needs no files and no packages."""


@dataclass(frozen=True)
class DataSource:
    """A source of images, registered under its name in ``megadit.extensions.DATA_SOURCES``.

    A plugin's is a function that loads a set, and the spec around it:

        def load(config: DataConfig, num_classes: int | None) -> ArraySet:
            import torch
            from megadit.data.dataset import ArraySet
            ...

        DATA_SOURCES.add("stripes", DataSource(load))

    Its module imports torch inside of functions, so that a wrong configuration is refused at once.

    load: (``data`` section, ``num_classes``) -> the whole set, a ``megadit.data.dataset.UnsplitSet``, such as the
        in-memory ``ArraySet``. Its caller splits off held-out images and applies ``data.condition`` and
        ``data.classes``. ``num_classes``: the model's, to check labels that are numbers; None: not known. Raises
        UserError that names the key.
    check: whether the files and packages exist; called before torch is imported. Raises UserError.
    reads: which of path, crop and skin_tones it reads; the others are refused. ``load`` always reads
        ``data.image_size``.
    options: names and defaults of its ``data.options``; values must have the types of the defaults. ``load`` reads
        ``config.options["NAME"]``, users write ``data.options.NAME=VALUE``.
    own_classes: its class names are fixed, so that an inherited ``data.classes`` is dropped where a configuration
        changes the source; the classes of folders and tars are the user's.
    may_store: it may store latents, text features and target features, which need neither codec nor encoder.
    """

    load: Callable[[DataConfig, int | None], Any]
    check: Callable[[DataConfig], object] = _no_check
    reads: tuple[str, ...] = ()
    options: Mapping[str, Scalar] = field(default_factory=dict)
    own_classes: bool = False
    may_store: bool = False
