"""Digits and Fashion-MNIST: the packaged table against scikit-learn's loader, idx files good and bad."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.config import DataConfig
from megadit.data import build_datasets, describe
from megadit.data.sources import fashion_mnist as fashion_set
from megadit.data.sources.digits import load as load_digits
from megadit.data.sources.fashion_mnist import read_idx
from megadit.errors import UserError


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    digits = load_digits(DataConfig(name="digits"))
    assert describe(digits).size == 1797 and digits.classes == tuple("0123456789")
    assert digits.labels.tolist() == bunch.target.tolist()
    np.testing.assert_array_equal(digits.images[:, 0].numpy(), np.rint(bunch.images * 255 / 16).astype(np.uint8))
    assert digits.caption(3) == "the handwritten digit 3"


def test_digits_do_not_import_scikit_learn() -> None:
    code = (
        "import sys; from megadit.config import DataConfig; from megadit.data import build_datasets; "
        "build_datasets(DataConfig(name='digits')); assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)


def test_digits_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        build_datasets(DataConfig(name="digits"))


def test_another_size_is_resized_with_pillow() -> None:
    small, large = load_digits(DataConfig(name="digits")), load_digits(DataConfig(name="digits", image_size=16))
    expected = Image.fromarray(small.images[5, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    assert large.image_size == 16 and large.image(5).shape == (1, 16, 16)
    np.testing.assert_array_equal(large.image(5)[0].numpy(), np.asarray(expected))


def test_val_fraction_zero_and_condition_none() -> None:
    train, val = build_datasets(DataConfig(name="digits", val_fraction=0.0, condition="none"))
    assert (len(train), len(val)) == (1797, 0)
    assert train.classes == () and {train.label(i) for i in range(50)} == {0}


def test_a_smaller_fraction_holds_out_a_part_of_a_larger() -> None:
    def held(fraction: float) -> set[bytes]:
        _, val = build_datasets(DataConfig(name="digits", val_fraction=fraction))
        return {val.image(i).numpy().tobytes() for i in range(len(val))}

    assert held(0.05) < held(0.2)


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match=r"data\.val_fraction: 0\.99\d* holds out all 2 images"):
        build_datasets(DataConfig(name="fashion-mnist", path=str(tmp_path), val_fraction=0.9999))


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder: Path, images: np.ndarray, labels: np.ndarray, compress: bool = True) -> None:
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_from_files(tmp_path: Path, compress: bool) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 28, 28), dtype=np.uint8), (np.arange(40) % 10).astype(np.uint8)
    write_set(tmp_path, images, labels, compress)
    train, val = build_datasets(DataConfig(name="fashion-mnist", path=str(tmp_path), val_fraction=0.0))
    facts = describe(train)
    assert (facts.channels, facts.image_size, facts.num_classes, facts.size, len(val)) == (1, 28, 10, 40, 0)
    assert torch.equal(torch.stack([train.image(i) for i in range(40)])[:, 0], torch.from_numpy(images))
    assert [train.label(i) for i in range(40)] == labels.tolist()
    assert train.caption(9) == "Ankle boot" and "Zalando" in train.notice


def test_an_idx_file_with_a_dot_in_its_name_is_found(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx_bytes(labels))
    assert len(fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path)))) == 3


def test_missing_folder_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder; .*apt install dataset-fashion-mnist"):
        fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path / "nowhere")))
    monkeypatch.setattr(fashion_set, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.path: not given; .*train-images-idx3-ubyte\.gz"):
        fashion_set.load(DataConfig(name="fashion-mnist"))
    with pytest.raises(UserError, match=r"has no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path)))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_set(tmp_path, np.zeros((3, 4, 4), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match=r"has 3 images but .* has 2 labels"):
        fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path)))
    write_set(tmp_path, np.zeros((2, 4, 4), np.uint8), np.array([1, 10], np.uint8))
    with pytest.raises(UserError, match=r"has label 10; labels must lie in 0\.\.\.9"):
        fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path)))
    write_set(tmp_path, np.zeros((2, 4, 5), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match="must be square"):
        fashion_set.load(DataConfig(name="fashion-mnist", path=str(tmp_path)))


def idx_header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
PACKED = gzip.compress(GOOD, mtime=0)


def test_a_good_idx_file(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(GOOD)
    np.testing.assert_array_equal(read_idx(tmp_path / "good", 3), np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty", b"", "begins with nothing instead of 00000803"),
        ("text", b"<html>", "begins with 3c68746d instead of 00000803"),
        ("labels", idx_bytes(np.zeros(3, np.uint8)), "begins with 00000801 instead of 00000803"),
        ("floats", b"\0\0\x0d\x03" + GOOD[4:], "begins with 00000d03"),
        ("header", GOOD[:10], "cut short in its header"),
        ("short", GOOD[:-1], r"holds 23 bytes where its header \[2, 3, 4\] promises 24"),
        ("long", GOOD + b"x", r"holds more than 24 bytes where its header \[2, 3, 4\] promises 24"),
        ("huge", idx_header(10**9, 28, 28), "promises 784,000,000,000 bytes, which is more than it can hold"),
        ("overflow.gz", gzip.compress(idx_header(*[2**32 - 1] * 3)), "more than it can hold"),
        ("bomb.gz", gzip.compress(idx_header(10**6, 100, 100) + bytes(2**23)), "more than it can hold, or than the"),
        ("longer.gz", gzip.compress(GOOD + bytes(2**23)), "holds more than 24 bytes where"),
        ("cut.gz", PACKED[:-9], "damaged gzip file"),
        ("plain.gz", GOOD, "damaged gzip file"),
        ("flipped.gz", PACKED[:12] + b"\xff\xff" + PACKED[14:], "damaged gzip file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_idx_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.path: .*{name}.*{sentence}"):
        read_idx(tmp_path / name, 3)
