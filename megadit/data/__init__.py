"""Images: the built-in sets and image folders, the order in which a run sees them, and batches of them."""

from typing import TYPE_CHECKING

from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.data.batch import Batch, make_batch, scale_images
    from megadit.data.build import build_datasets
    from megadit.data.checks import check_against_model
    from megadit.data.dataset import DatasetFacts, ImageSet, describe
    from megadit.data.order import BatchLayout, SampleOrder
    from megadit.data.stream import BatchStream
    from megadit.data.verify import ImageCheck, check_images

__all__ = [
    "Batch",
    "BatchLayout",
    "BatchStream",
    "DatasetFacts",
    "ImageCheck",
    "ImageSet",
    "SampleOrder",
    "build_datasets",
    "check_against_model",
    "check_images",
    "describe",
    "make_batch",
    "scale_images",
]

# What is missing is refused before torch is imported (see places): the package itself imports nothing.
__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("Batch", "make_batch", "scale_images"), "batch"),
        **dict.fromkeys(("DatasetFacts", "ImageSet", "describe"), "dataset"),
        **dict.fromkeys(("BatchLayout", "SampleOrder"), "order"),
        **dict.fromkeys(("ImageCheck", "check_images"), "verify"),
        "BatchStream": "stream",
        "build_datasets": "build",
        "check_against_model": "checks",
    },
)
