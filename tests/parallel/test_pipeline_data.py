"""Which ranks of a pipeline read data: the first stage and the last, and no others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.layouts.matrix import matrix_config
from helpers.layouts.parity import TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import assemble_rank
from megadit.config import RunConfig

STEPS = 3


def config_of(root: Path, workers: int, **parallel: Any) -> RunConfig:
    """A small DiT with REPA that validates after every step."""
    config = matrix_config("dit", root, True, **parallel)
    train = {"steps": STEPS, "validation_images": 12, "validate_every": 1, "log_every": 1}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update={"workers": workers}),
        }
    )


def trained(config: RunConfig, folder: str) -> tuple[list[dict[str, Any]], Counter[str], bool]:
    """The log of a run through its own loop, what this rank read and how often, and whether it has an encoder."""
    from megadit.data import stream
    from megadit.train import validation
    from megadit.train.callbacks import Callback
    from megadit.train.callbacks.artifacts import Validation
    from megadit.train.loop import Trainer

    reads: Counter[str] = Counter()
    records: list[dict[str, Any]] = []

    class Log(Callback):
        def on_log(self, run: Any, record: Any) -> None:
            records.append(record)

    def record_calls(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reads[name] += 1
            return plain(*args, **kwargs)

        setattr(module, name, call)

    run = assemble_rank(config, folder)
    record_calls(stream, "read_samples")
    record_calls(stream, "DataLoader")
    record_calls(validation, "make_batch")
    assert Trainer(run, [Validation(), Log()]).fit().code == 0
    return records, reads, run.engine.loss.features is not None


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stages_in_the_middle_read_nothing(tmp_path: Path, workers: int) -> None:
    [(expected, _, encodes)] = run_ranks(1, trained, config_of(tmp_path, 0), str(tmp_path / "alone"))
    assert encodes and len(expected) == STEPS
    results = run_ranks(4, trained, config_of(tmp_path, workers, pipeline=4, world=4), str(tmp_path / "stages"))
    for rank, (records, reads, encodes) in enumerate(results):
        assert encodes == (rank == 3)
        if rank in (1, 2):
            assert not reads, f"rank {rank} read {reads}"
        else:
            assert reads["make_batch"] == STEPS * 3 and reads["DataLoader"] == (workers > 0)
            assert bool(reads["read_samples"]) == (workers == 0)
        for record, other in zip(records, expected, strict=True):
            for key in ("loss", "loss_repa", "val_loss", "val_repa", "grad_norm"):
                assert record[key] == pytest.approx(other[key], rel=3 * TOLERANCE), (rank, key)
            assert record["samples_seen"] == other["samples_seen"]
