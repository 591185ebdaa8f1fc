"""The ``digits`` set: 1,797 handwritten digits, 8 x 8 grey, from the table that scikit-learn's wheel carries."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.errors import UserError
from megadit.files.file_kind import file_instead

if TYPE_CHECKING:
    from megadit.data.dataset import ArraySet

NATIVE_SIZE = 8
NOTICE = (
    "Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, CC-BY 4.0, as distributed with scikit-learn (BSD-3-Clause)."
)


def load(config: DataConfig, num_classes: int | None = None) -> ArraySet:
    """The whole set. Pixel values 0...16 become 0...255; sizes other than 8 are resized on access.

    Raises ``UserError`` when scikit-learn is not installed, or its table cannot be read.
    """
    import numpy as np
    import torch

    from megadit.data.dataset import ArraySet

    path = find_table()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = file_instead(path, "gzip") or f"it is damaged ({error})"
        raise UserError(f"data.name: digits: {path} cannot be read: {reason}; install scikit-learn again") from error
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, NATIVE_SIZE, NATIVE_SIZE)
    labels = torch.from_numpy(table[:, -1].copy())
    return ArraySet(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        image_size=config.image_size or NATIVE_SIZE,
        notice=NOTICE,
        images=torch.from_numpy(pixels),
        labels=labels,
        captions=tuple(f"the handwritten digit {digit}" for digit in labels.tolist()),
        bases=tuple(str(i) for i in range(len(labels))),
    )


def find_table() -> Path:
    """The packaged table, found without importing scikit-learn (which takes seconds). Raises UserError without it."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise UserError("data.name: digits needs the package scikit-learn; pip install scikit-learn, or choose another set")


SOURCE = DataSource(load, lambda config: find_table(), own_classes=True)
