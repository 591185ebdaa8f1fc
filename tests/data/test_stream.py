"""Streams: the same batches with and without workers, from any step on, and errors as one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.config import DataConfig
from megadit.data.batch import Batch
from megadit.data.dataset import ArraySet
from megadit.data.order import BatchLayout
from megadit.data.sources.image_folder import load as load_folder
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.data.stream import BatchStream
from megadit.errors import UserError


def numbered_set(size: int = 20) -> ArraySet:
    pixels = torch.arange(size * 16).reshape(size, 1, 4, 4).remainder(253).to(torch.uint8)
    names = tuple(str(i) for i in range(size))
    return ArraySet("numbered", ("x", "y"), 4, "", pixels, torch.arange(size) % 2, names, names)


def assert_same(one: Batch, two: Batch) -> None:
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.numbers, two.numbers)
    assert one.captions == two.captions


@pytest.fixture
def folder(tmp_path: Path) -> FolderSet:
    """Six noisy pictures in two classes."""
    random = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
    return load_folder(DataConfig(name="image-folder", path=str(tmp_path), image_size=4))


def test_a_stream_walks_through_steps_and_micro_batches() -> None:
    stream = BatchStream(numbered_set(), BatchLayout(8, 2, 1, 2), seed=0, flip=False, workers=0)
    seen, positions = [], []
    for _ in range(6):
        positions.append((stream.step, stream.micro, stream.epoch))
        seen.append(next(stream).numbers.tolist())
    assert seen == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19], [22, 23]]
    assert positions == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 1)]


def test_workers_change_nothing_and_a_resumed_stream_continues(folder: FolderSet) -> None:
    layout = BatchLayout(4, 1, 0, 2)
    with BatchStream(folder, layout, seed=3, flip=True, workers=0) as plain:
        expected = list(islice(plain, 12))
    before = torch.get_rng_state()
    with BatchStream(folder, layout, seed=3, flip=True, workers=2) as ahead:
        for one, two in zip(islice(ahead, 12), expected, strict=True):
            assert_same(one, two)
        processes = list(ahead._processes)
        assert len(processes) == 2 and all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)
    assert torch.equal(torch.get_rng_state(), before)
    for workers in (0, 1):
        with BatchStream(folder, layout, seed=3, flip=True, workers=workers, start_step=4) as resumed:
            for one, two in zip(islice(resumed, 4), expected[8:], strict=True):
                assert_same(one, two)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_what_one_rank_sees(ranks: int) -> None:
    def images_by_number(ranks: int, micro_batch: int) -> dict[int, torch.Tensor]:
        images: dict[int, torch.Tensor] = {}
        for rank in range(ranks):
            layout = BatchLayout(8, ranks, rank, micro_batch)
            stream = BatchStream(numbered_set(), layout, seed=1, flip=True, workers=0)
            for batch in islice(stream, 3 * layout.accumulation):
                images.update(zip(batch.numbers.tolist(), batch.images, strict=True))
        return images

    reference, split = images_by_number(1, 8), images_by_number(ranks, 2)
    assert sorted(split) == sorted(reference) == list(range(24))
    assert all(torch.equal(split[n], reference[n]) for n in reference)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_one_sentence_wherever_it_is_read(folder: FolderSet, workers: int) -> None:
    broken = folder.path(3)
    broken.write_bytes(broken.read_bytes()[:100])
    with BatchStream(folder, BatchLayout(6, 1, 0, 6), seed=0, flip=False, workers=workers) as stream:
        with pytest.raises(UserError) as caught:
            next(stream)
        message = str(caught.value)
        assert message.startswith(f"data.path: cannot decode the image {broken} (")
        number = stream.order.indices(range(6)).index(3)
        assert message.endswith(
            f" replace the file or take it out of the set (sample {number}, for step 1; data.on_corrupt is stop)"
        )
        assert "\n" not in message and "Traceback" not in message
        with pytest.raises(ValueError, match="closed"):
            next(stream)


def test_a_closed_stream_stays_closed() -> None:
    stream = BatchStream(numbered_set(), BatchLayout(2, 1, 0, 2), seed=0, flip=False, workers=0)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


_SCRIPT = """
import sys, time
import torch
from megadit.data import BatchLayout, BatchStream
from megadit.data.dataset import ArraySet

if __name__ == "__main__":
    data = ArraySet("s", (), 2, "", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4).long(), ("",) * 4, ("",) * 4)
    stream = BatchStream(data, BatchLayout(2, 1, 0, 2), seed=0, flip=False, workers=1)
    next(stream)
    print(stream._processes[0].pid, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    for _ in range(20):
        next(stream)
        time.sleep(0.02)
    print("done", flush=True)
"""  # noqa: E501


def _start(tmp_path: Path, what: str) -> tuple[subprocess.Popen[str], int]:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.distributed
def test_workers_outlive_the_signals_of_a_job_but_not_the_run(tmp_path: Path) -> None:
    """Signals that Slurm sends to every process leave workers alone; an exit without close() does not hang."""
    process, worker = _start(tmp_path, "run")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)
    output, _ = process.communicate(timeout=60)
    assert output.strip() == "done" and process.returncode == 0
    assert _gone(worker)


@pytest.mark.distributed
def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    process, worker = _start(tmp_path, "wait")
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not _gone(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert _gone(worker)
