"""The ``fashion-mnist`` set: 60,000 grey 28 x 28 pictures of clothes in 10 classes, from given idx files."""

from __future__ import annotations

import torch

from megadit.data.dataset import ArraySet
from megadit.data.places import fashion_files
from megadit.data.sources.idx import read_idx
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


def load(path: str | None, image_size: int | None) -> ArraySet:
    """The 60,000 training pictures of the files in ``path`` (default: Debian's folder); the test files stay unread.

    Raises ``UserError`` when the folder or a file is missing or damaged.
    """
    image_file, label_file = fashion_files(path)
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
