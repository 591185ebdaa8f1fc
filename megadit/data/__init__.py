"""Data sets of images, the order of a run's samples, and batches."""

from typing import TYPE_CHECKING

from megadit.lazy import lazy_exports

if TYPE_CHECKING:
    from megadit.data.batch import Batch, make_batch
    from megadit.data.build import build_datasets
    from megadit.data.checks import check_against_model
    from megadit.data.dataset import ImageSet, describe
    from megadit.data.order import BatchLayout, SampleOrder
    from megadit.data.stream import BatchStream
    from megadit.data.verify import check_images

__all__ = [
    "Batch",
    "BatchLayout",
    "BatchStream",
    "ImageSet",
    "SampleOrder",
    "build_datasets",
    "check_against_model",
    "check_images",
    "describe",
    "make_batch",
]

# What is missing is refused before torch is imported (see prerequisites): the package itself imports nothing.
__getattr__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Batch", "make_batch"), "batch"),
        **dict.fromkeys(("ImageSet", "describe"), "dataset"),
        **dict.fromkeys(("BatchLayout", "SampleOrder"), "order"),
        "check_images": "verify",
        "BatchStream": "stream",
        "build_datasets": "build",
        "check_against_model": "checks",
    },
)
