"""Fragment files: safetensors reads them, any part comes back from any parts, and nothing changed passes for sound."""

import itertools
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import run_ranks
from megadit.checkpoint import fragment_files
from megadit.checkpoint.format import BLOCK, BrokenCheckpoint, StoredFragment
from megadit.checkpoint.fragment_files import write_fragments
from megadit.checkpoint.fragment_reader import FragmentReader
from megadit.slices import PendingSpans, contiguous_spans

SHAPES = {"block.w": [1000]}


def store(folder, tensors, shapes, block=BLOCK):
    """Write fragments (with values) to the files that they name; a reader for them."""
    records, fragments = {}, []
    for file in sorted({fragment.file for fragment, _ in tensors}):
        records[file], written = write_fragments(folder / file, [t for t in tensors if t[0].file == file])
        fragments += written
    return FragmentReader(folder, shapes, fragments, records, block)


@pytest.fixture
def stored(tmp_path):
    """One tensor of 1000 elements in three fragments over two files."""
    values = torch.randn(1000)
    cuts = [(0, 300, "a"), (300, 301, "b"), (301, 1000, "a")]
    fragments = [StoredFragment("weights", "block.w", low, high, f"{name}.safetensors") for low, high, name in cuts]
    return tmp_path, store(tmp_path, [(p, values[p.start : p.stop]) for p in fragments], SHAPES), fragments, values


def test_files_are_plain_safetensors(stored):
    folder, _, fragments, values = stored
    tensors = load_file(folder / "a.safetensors")
    assert set(tensors) == {fragments[0].key, fragments[2].key}
    assert torch.equal(tensors[fragments[2].key], values[301:])


@pytest.mark.parametrize("block", [8, 64, 1 << 20])
@pytest.mark.parametrize(("start", "count"), [(0, 1000), (299, 3), (300, 1), (150, 600), (999, 1)])
def test_any_range_reads_back(tmp_path, monkeypatch, block, start, count):
    monkeypatch.setattr(fragment_files, "BLOCK", block)
    values = torch.randn(1000)
    cuts = [(0, 300), (300, 301), (301, 1000)]
    fragments = [(StoredFragment("weights", "block.w", low, high, "a"), values[low:high]) for low, high in cuts]
    reader = store(tmp_path, fragments, SHAPES, block)
    target = torch.full((count,), torch.nan)
    with reader:
        reader.read_into(target, "weights", "block.w", start)
    assert torch.equal(target, values[start : start + count])


def test_a_missing_fragment_is_reported(stored):
    _, reader, _, _ = stored
    del reader._by_tensor["weights", "block.w"][2]  # by file: the single element
    with reader, pytest.raises(BrokenCheckpoint, match="1 of 1000 elements of weights of 'block.w'"):
        reader.read_into(torch.empty(1000), "weights", "block.w")


def test_every_changed_or_lost_byte_is_found(stored):
    folder, reader, _, values = stored
    path = folder / "b.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with reader, pytest.raises(BrokenCheckpoint, match=r"b\.safetensors"):
            reader.read_into(torch.empty(1000), "weights", "block.w")
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with reader, pytest.raises(BrokenCheckpoint, match=r"b\.safetensors: cannot be read"):
            reader.read_into(torch.empty(1000), "weights", "block.w")
    path.unlink()
    with reader, pytest.raises(BrokenCheckpoint, match="No such file"):
        reader.read_into(torch.empty(1000), "weights", "block.w")
    path.write_bytes(whole)
    target = torch.empty(1000)
    with reader:
        reader.read_into(target, "weights", "block.w")
    assert torch.equal(target, values)


def test_only_what_is_read_is_checked(tmp_path, monkeypatch):
    """A rank that needs a part reads and checks the blocks of that part: damage elsewhere is another rank's to find."""
    monkeypatch.setattr(fragment_files, "BLOCK", 64)
    values = torch.randn(100)
    reader = store(tmp_path, [(StoredFragment("weights", "w", 0, 100, "f"), values)], {"w": [100]}, 64)
    data = bytearray((tmp_path / "f").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f").write_bytes(bytes(data))
    target = torch.empty(50)
    with reader:
        reader.read_into(target, "weights", "w", 10)
        assert torch.equal(target, values[10:60])
        with pytest.raises(BrokenCheckpoint, match="wrong checksum"):
            reader.read_into(target, "weights", "w", 50)


def split(size, parts):
    cuts = [0, *sorted(random.sample(range(1, size), parts - 1)), size]
    return list(itertools.pairwise(cuts))


def layouts(shape):
    """Ways of tensor parallelism to cut a weight over two ranks: by rows, by columns, by heads of fused q, k and v."""
    rows, columns = shape
    half, third = rows // 2, rows // 3
    everything = (0, columns)
    yield [None]
    yield [(((0, half), everything),), (((half, rows), everything),)]
    yield [(((0, rows), (0, 3)),), (((0, rows), (3, columns)),)]
    heads = [
        [((part * third + head * third // 2, part * third + (head + 1) * third // 2), everything) for part in range(3)]
        for head in (0, 1)
    ]
    yield [tuple(shard_regions) for shard_regions in heads]
    yield [(((0, half), (0, 3)), ((half, rows), (3, columns))), (((0, half), (3, columns)), ((half, rows), (0, 3)))]


def part_of(whole, shard_regions):
    if shard_regions is None:
        return whole.flatten()
    return torch.cat([whole[tuple(slice(*sides) for sides in box)].flatten() for box in shard_regions])


@pytest.mark.parametrize("saved", range(5))
def test_what_one_slicing_wrote_any_other_reads(tmp_path, saved):
    """Tensor-parallel slices, each cut once more by ZeRO, from every layout into every layout."""
    random.seed(saved)
    shape = [12, 8]
    whole = torch.randn(shape)
    tensors = []
    for rank, shard_regions in enumerate(list(layouts(shape))[saved]):
        values = part_of(whole, shard_regions)
        for low, high in split(len(values), 4):
            tensors.append((StoredFragment("weights", "w", low, high, f"f{rank}", shard_regions), values[low:high]))
    with store(tmp_path, tensors, {"w": shape}) as reader:
        for shard_regions in itertools.chain(*layouts(shape)):
            expected = part_of(whole, shard_regions)
            for low, high in split(len(expected), 5):
                target = torch.full((high - low,), torch.nan)
                reader.read_into(target, "weights", "w", low, shard_regions)
                assert torch.equal(target, expected[low:high])


def test_fragments_that_overlap_are_read_once():
    pending = PendingSpans(contiguous_spans([10], None, 2, 9))
    assert pending.take(contiguous_spans([10], None, 0, 5)) == [(2, 0, 3)]
    assert pending.take(contiguous_spans([10], None, 0, 7)) == [(5, 3, 2)]
    assert pending.remaining == 2


MEGABYTES, FRAGMENTS = 8, 12  # a fragment, and how many


def _peaks(folder):
    """How far the resident memory rose (MB) over writing and over reading all fragments."""
    size = MEGABYTES << 18
    tensors = [torch.randn(size) for _ in range(FRAGMENTS)]
    fragments = [StoredFragment("weights", f"w{i}", 0, size, "f") for i in range(FRAGMENTS)]
    shapes = {fragment.name: [size] for fragment in fragments}

    def rise(action):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        action()
        return (_status("VmHWM") - before) / 1024

    written = []
    up = rise(lambda: written.append(write_fragments(Path(folder) / "f", list(zip(fragments, tensors, strict=True)))))
    record, done = written[0]

    def read():
        with FragmentReader(Path(folder), shapes, done, {"f": record}) as reader:
            for fragment, tensor in zip(done, tensors, strict=True):
                reader.read_into(tensor, "weights", fragment.name)

    return up, rise(read)


def _status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


@pytest.mark.distributed
def test_memory_is_bounded_by_a_fragment(tmp_path):
    (written, read), *_ = run_ranks(1, _peaks, str(tmp_path))
    assert written < MEGABYTES and read < MEGABYTES, (written, read)  # of 96 MB


def test_a_full_disk_is_an_os_error(tmp_path):
    """The limit on a file's size stands for the disk's: what write_fragments meets is what the caller tells."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_fragments(tmp_path / "f", [(StoredFragment("weights", "w", 0, 1000, "f"), torch.randn(1000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
