"""``DataSource``: what a source of images is, without importing what reads it. ``data.name`` chooses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megadit.config.options import Scalar

if TYPE_CHECKING:
    from megadit.config.schema.data import DataConfig


def _nothing_to_find(config: DataConfig) -> None:
    """Of a source that needs no files and no packages."""


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

    load: the whole set of the ``data`` section, a ``megadit.data.dataset.UnsplitSet``, of which ``ArraySet`` is one in
        memory. Its caller holds images out, and leaves classes out as ``data.condition`` and ``data.classes`` say.
        ``num_classes``: the model's, against which labels that are numbers are held; None: not known.
        Raises UserError that names the key.
    check: whether the files and packages are there; called before torch is imported. Raises UserError.
    reads: which of path, crop and skin_tones it reads; the others are refused beside it. Of the keys that are for all
        sources ``load`` heeds ``data.image_size``.
    options: names and defaults of what it reads of ``data.options``, whose values have the types of the defaults:
        ``load`` reads ``config.options["NAME"]``, users write ``data.options.NAME=VALUE``.
    own_classes: its classes have names of its own, so that an inherited ``data.classes`` ends where a configuration
        changes the source; the classes of folders and tars are the user's.
    may_store: it may hold latents, text and target features, which need neither codec nor encoder.
    """

    load: Callable[[DataConfig, int | None], Any]
    check: Callable[[DataConfig], object] = _nothing_to_find
    reads: tuple[str, ...] = ()
    options: Mapping[str, Scalar] = field(default_factory=dict)
    own_classes: bool = False
    may_store: bool = False
