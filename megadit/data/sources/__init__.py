"""The sources of images that megadit has, one file or folder each: ``SOURCE``, a ``megadit.config.data_source``.

``data.name`` chooses one. They import torch inside of functions, since the configuration asks them what they read.
"""

from collections.abc import Mapping

SOURCES: Mapping[str, str] = {
    "emoji": "megadit.data.sources.emoji:SOURCE",
    "digits": "megadit.data.sources.digits:SOURCE",
    "fashion-mnist": "megadit.data.sources.fashion_mnist:SOURCE",
    "image-folder": "megadit.data.sources.image_folder:SOURCE",
    "webdataset": "megadit.data.sources.webdataset:SOURCE",
}
