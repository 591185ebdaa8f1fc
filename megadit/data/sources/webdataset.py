"""The ``webdataset`` source: local tars of anybody, and those that make_shards and encode wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.data.shards.shard_files import find_shards

if TYPE_CHECKING:
    from megadit.data.shards.tar_set import TarSet


def load(config: DataConfig, num_classes: int | None) -> TarSet:
    """The set at ``data.path``. Raises UserError as ``load_tars`` does."""
    from megadit.data.shards.tar_set import load_tars

    return load_tars(config, num_classes)


SOURCE = DataSource(load, lambda config: find_shards(config.path), reads=("path", "crop"), may_store=True)
