"""The ``fashion-mnist`` set: 60,000 grey 28 x 28 pictures of clothes in 10 classes, from given idx files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.errors import UserError
from megadit.files.file_kind import file_instead

if TYPE_CHECKING:
    import numpy as np

    from megadit.data.dataset import ArraySet

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 2**31  # of the elements; Fashion-MNIST has 47 million
_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for, at most
NOTICE = "Fashion-MNIST: copyright 2017 Zalando SE, MIT licence."


def load(config: DataConfig, num_classes: int | None = None) -> ArraySet:
    """The 60,000 training pictures of the files in ``data.path`` (default: Debian's folder); the test files stay
    unread.

    Raises ``UserError`` when the folder or a file is missing or damaged.
    """
    import torch

    from megadit.data.dataset import ArraySet

    image_file, label_file = find_files(config)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"data.path: {image_file} has {len(images)} images but {label_file} has {len(labels)} labels; "
            "give files that belong together"
        )
    if images.shape[1] != images.shape[2]:
        raise UserError(f"data.path: {image_file} has images of {images.shape[1:]} pixels; they must be square")
    if int(labels.max()) >= len(CLASSES):
        raise UserError(f"data.path: {label_file} has label {int(labels.max())}; labels must lie in 0...9")
    return ArraySet(
        name="fashion-mnist",
        classes=CLASSES,
        image_size=config.image_size or int(images.shape[1]),
        notice=NOTICE,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels.astype("int64")),
        captions=tuple(CLASSES[label] for label in labels.tolist()),
        bases=tuple(str(i) for i in range(len(labels))),
    )


def find_files(config: DataConfig) -> tuple[Path, Path]:
    """Images and labels, in ``data.path`` or Debian's folder. Raises UserError if they are missing."""
    path = config.path
    folder = Path(path) if path is not None else FOLDER
    if not folder.is_dir():
        problem = f"{folder} is not a folder" if path is not None else "not given"
        raise UserError(
            f"data.path: {problem}; fashion-mnist needs the folder with train-images-idx3-ubyte.gz and "
            "train-labels-idx1-ubyte.gz (Debian: apt install dataset-fashion-mnist)"
        )
    return _find(folder, "train-images-idx3-ubyte"), _find(folder, "train-labels-idx1-ubyte")


def _find(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder``, plain, gzipped, or with a dot for the dash before "idx".

    Raises ``UserError`` that names the file.
    """
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(f"data.path: {folder} has no {name} or {name}.gz; give the folder that holds the idx files")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file, plain or gzipped, with this many dimensions.

    The format of MNIST and its kin, big-endian: two zero bytes, one byte for the element type (8: unsigned byte), one
    for the number of dimensions, one 32-bit size per dimension, then the elements in row-major order.

    No more is unpacked than the header promises, and nothing if the file is too small for it. Raises ``UserError`` that
    names the file when it is not an idx file, or has fewer or more bytes.
    """
    import numpy as np

    header = 4 + 4 * dimensions
    head = _read(path, 0, header)
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if head[:4] != expected:
        other = file_instead(path, "empty") if path.suffix != ".gz" else None
        raise UserError(
            f"data.path: {path} is not an idx file of unsigned bytes in {dimensions} dimensions: it begins with "
            f"{head[:4].hex() or 'nothing'} instead of {expected.hex()}; {other or 'give the original file'}"
        )
    if len(head) < header:
        raise UserError(f"data.path: {path} is cut short in its header; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    promised = math.prod(shape)
    if promised > min(_MOST_BYTES, _DEFLATED * path.stat().st_size):
        raise UserError(
            f"data.path: {path} has a header {list(shape)} that promises {promised:,} bytes, which is more than it can "
            f"hold, or than the {_MOST_BYTES:,} that are read; fetch the file again"
        )
    content = _read(path, header, promised + 1)
    if len(content) != promised:
        size = len(content) if len(content) < promised else f"more than {promised}"
        raise UserError(
            f"data.path: {path} holds {size} bytes where its header {list(shape)} promises {promised}; fetch the file "
            "again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()


def _read(path: Path, start: int, count: int) -> bytes:
    """At most ``count`` bytes from ``start`` on, unpacked where the file is gzipped."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        other = file_instead(path, "gzip")
        problem = f"is no gzip file: {other}" if other else f"is a damaged gzip file ({error}); fetch the file again"
        raise UserError(f"data.path: {path} {problem}") from None
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror or error}); check the file") from None


SOURCE = DataSource(load, find_files, reads=("path",), own_classes=True)
