"""Fragment files: safetensors reads them, and any range comes back from any split."""

import pytest
import torch
from safetensors.torch import load_file

from megadit.errors import UserError
from megadit.train.fragment_io import Piece, PieceReader, write_pieces


@pytest.fixture
def stored(tmp_path):
    """One tensor of 1000 elements in three pieces over two files."""
    values = torch.randn(1000)
    cuts = [(0, 300, "a"), (300, 301, "b"), (301, 1000, "a")]
    pieces = [Piece("weights", "block.w", low, high, f"{name}.safetensors") for low, high, name in cuts]
    for name in ("a", "b"):
        mine = [(p, values[p.start : p.stop]) for p in pieces if p.file.startswith(name)]
        write_pieces(tmp_path / f"{name}.safetensors", mine)
    return tmp_path, pieces, values


def test_files_are_plain_safetensors(stored):
    folder, pieces, values = stored
    tensors = load_file(folder / "a.safetensors")
    assert set(tensors) == {pieces[0].key, pieces[2].key}
    assert torch.equal(tensors[pieces[2].key], values[301:])


@pytest.mark.parametrize(("start", "count"), [(0, 1000), (299, 3), (300, 1), (150, 600), (999, 1)])
def test_any_range_reads_back(stored, start, count):
    folder, pieces, values = stored
    target = torch.full((count,), torch.nan)
    with PieceReader(folder, pieces) as reader:
        reader.read_into(target, "weights", "block.w", start)
    assert torch.equal(target, values[start : start + count])


def test_missing_piece_is_told(stored):
    folder, pieces, _ = stored
    with PieceReader(folder, [pieces[0], pieces[2]]) as reader, pytest.raises(UserError, match="999 of 1000"):
        reader.read_into(torch.empty(1000), "weights", "block.w")


def test_unreadable_file_is_told(stored):
    folder, pieces, _ = stored
    (folder / "b.safetensors").write_bytes(b"\x10")
    with PieceReader(folder, pieces) as reader, pytest.raises(UserError, match=r"b\.safetensors: cannot be read"):
        reader.read_into(torch.empty(1000), "weights", "block.w")
