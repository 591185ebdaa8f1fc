"""Whether the files and packages that a configuration names are on this machine, before torch is imported.

So a wrong path fails in a fraction of a second. The content of the files is checked by their readers.
"""

from __future__ import annotations

from megadit.config import RunConfig
from megadit.config.schema.data import DataConfig
from megadit.data.codecs.folder import codec_folder
from megadit.data.features.folders import check_dinov2, check_packages
from megadit.data.text.folders import check_source
from megadit.extensions import DATA_SOURCES


def check_prerequisites(config: RunConfig) -> None:
    """Look for the images, the codec, the text encoder and the feature network of a run.

    Raises:
        UserError: a folder, file or package is missing, naming the key.
    """
    _check(config.data, text=config.model.text is not None, features=config.model.repa is not None)


def check_data_prerequisites(data: DataConfig) -> None:
    """As ``check_prerequisites``, for every part of a ``data`` section without a model."""
    _check(data, text=data.condition == "text", features=True)


def _check(data: DataConfig, *, text: bool, features: bool) -> None:
    source = DATA_SOURCES.get(data.name)
    source.check(data)
    if source.may_store:
        return
    if data.vae is not None:
        codec_folder(data.vae)
    if text:
        check_source(data.text)
    if features and data.features is not None:
        if data.features.encoder == "dinov2":
            check_dinov2(data.features.path, data.features.image_size)
        elif data.features.encoder == "efficientnet-lite0":
            check_packages()
