"""Pictures of an npz: what launch/sample.py wrote is read whole, and a small file makes no large array."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megadit.diffusion.sampling.grid import save_npz
from megadit.errors import UserError
from megadit.evaluate import pictures as reader
from megadit.evaluate.pictures import read_pictures


def test_what_was_written_is_read(tmp_path: Path) -> None:
    pictures = torch.arange(2 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(read_pictures(save_npz(pictures, tmp_path / "a.npz")), pictures)
    np.savez_compressed(tmp_path / "b.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy())
    assert torch.equal(read_pictures(tmp_path / "b.npz"), pictures)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((2000, 16, 16, 3), np.uint8))
    assert read_pictures(tmp_path / "a.npz").shape == (2000, 3, 16, 16)  # flat pictures, but few
    monkeypatch.setattr(reader, "_LARGE", 2**20)
    monkeypatch.setattr(np, "load", lambda *args, **options: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"a\.npz: its [\d,]+ bytes unpack to 1,536,128, as no real pictures do"):
        read_pictures(tmp_path / "a.npz")


def test_an_encrypted_or_damaged_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        start = archive.start_dir
    data[start + 8] |= 1  # the mark of encryption
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"b\.npz: arr_0 cannot be read \(.*encrypted"):
        read_pictures(tmp_path / "b.npz")
    data[start + 8] ^= 1
    data[200] ^= 255
    (tmp_path / "c.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"c\.npz: arr_0 cannot be read \(Bad CRC"):
        read_pictures(tmp_path / "c.npz")
