"""The ``fashion-mnist`` set: 60,000 grey 28 x 28 pictures of clothes in 10 classes, from given idx files."""

from __future__ import annotations

from pathlib import Path

import torch

from megadit.data.dataset import ArraySet
from megadit.data.idx import find_idx, read_idx
from megadit.errors import UserError

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
NOTICE = "Fashion-MNIST: copyright 2017 Zalando SE, MIT licence."
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files


def load(path: str | None, image_size: int | None) -> ArraySet:
    """The 60,000 training pictures of the files in ``path`` (default: Debian's folder); the test files stay unread.

    Raises ``UserError`` when the folder or a file is missing or damaged.
    """
    folder = Path(path) if path is not None else SYSTEM_FOLDER
    if not folder.is_dir():
        told = f"{folder} is not a folder" if path is not None else "not given"
        raise UserError(
            f"data.path: {told}; fashion-mnist needs the folder with train-images-idx3-ubyte.gz and "
            "train-labels-idx1-ubyte.gz (Debian: apt install dataset-fashion-mnist)"
        )
    image_file, label_file = (
        find_idx(folder, "train-images-idx3-ubyte"),
        find_idx(folder, "train-labels-idx1-ubyte"),
    )
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
        image_size=image_size or int(images.shape[1]),
        notice=NOTICE,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels.astype("int64")),
        captions=tuple(CLASSES[label] for label in labels.tolist()),
        bases=tuple(str(i) for i in range(len(labels))),
    )
