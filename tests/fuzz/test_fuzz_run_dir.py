"""What a run directory holds beside checkpoints: read after a crash, an edit or a bad copy, without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from helpers.fuzz.hunt import efforts, hunt, json_bytes, mutated, odd_json, odd_values
from helpers.training import small_config
from megadit.checkpoint.names import run_config, saved_step
from megadit.compare.curves import read_curve
from megadit.config.loading.loader import save_config
from megadit.diffusion.sampling.classes import read_classes, read_notice, resolve_classes
from megadit.diffusion.sampling.prompts import read_prompts
from megadit.files.owner_file import Owner
from megadit.search.workers.scores import _value
from megadit.search.workers.trial import _why_diverged
from megadit.train.divergence import earlier_divergence_notes, recorded_events
from megadit.train.run_dir import RunDirectory
from megadit.transfer.score_table import Columns, verify_table

ROWS: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 1.0 / step,
        "loss_mse": 0.9 / step,
        "lr": 1e-3,
        "lr_groups": {"hidden": 1e-3},
        "samples_seen": 16 * step,
    }
    for step in range(1, 6)
]


def _lines(rows: Any) -> bytes:
    return b"".join(json_bytes(row) + b"\n" for row in rows) if isinstance(rows, list) else json_bytes(rows)


@efforts
def test_metrics(effort: str, tmp_path: Path) -> None:
    """As ``compare_runs`` reads them, and as a resumed run truncates them."""
    run = RunDirectory(tmp_path)
    (tmp_path / "exit.json").write_text('{"code": 1, "reason": "diverged"}', encoding="utf-8")

    def read(data: bytes) -> None:
        run.metrics.write_bytes(data)
        read_curve(tmp_path)
        run.truncate_metrics(3)
        rows = run.read_metrics()
        assert all(row["step"] <= 3 for row in rows)

    known = [
        b'{"step": 1, "loss": 1, "samples_seen": []}',
        _lines(ROWS) + b"\x9b\n",
        b"[" * 3000,
        b'{"step": "a"}\n' + _lines(ROWS),
    ]
    hunt(effort, st.one_of(odd_values([ROWS]).map(_lines), mutated([_lines(ROWS)])), read, known)


@efforts
def test_exit_and_other_small_files(effort: str, tmp_path: Path) -> None:
    """exit.json, diverged.json, classes.json, wandb.json, latest: each damaged in turn."""
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(_lines(ROWS))
    save_config(small_config(), tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    event = {
        "kind": "non-finite",
        "step": 3,
        "samples": [[32, 48]],
        "what": "loss",
        "value": "nan",
        "broken_samples": [[33, 34]],
        "images": [5],
        "time": "t",
    }
    files: dict[str, list[Any]] = {
        "exit.json": [{"code": 1, "reason": "diverged: x", "step": 3, "time": "2026-01-01T00:00:00+0000"}],
        "diverged.json": [[event]],
        "classes.json": [["cat", "dog", "007"]],
        "wandb.json": [{"id": "abc"}],
    }
    drawn = st.one_of(
        *(st.tuples(st.just(name), odd_json(valid)) for name, valid in files.items()),
        st.tuples(st.just("checkpoints/latest"), mutated([b"step-00000005\n"])),
        st.tuples(st.just("DATA-NOTICE.txt"), mutated(["Pictures of café, CC-BY\n".encode()])),
    )

    def read(value: tuple[str, bytes]) -> None:
        name, data = value
        (tmp_path / name).write_bytes(data)
        try:
            look_at_run(tmp_path, run)
        finally:
            (tmp_path / name).unlink(missing_ok=True)

    known = [
        ("diverged.json", b'[{"step": 1, "what": "loss", "samples": [["a/b", 2]]}]'),
        ("diverged.json", b'[{"step": 1, "what": "loss", "samples": [0.5]}]'),
        ("diverged.json", b"[" * 3000),
        ("exit.json", b'{"code": 1e400, "reason": []}'),
    ]
    hunt(effort, drawn, read, known, quick=33)


def look_at_run(folder: Path, run: RunDirectory) -> None:
    run_config(folder)
    read_curve(folder)
    earlier_divergence_notes([folder], 0, ())
    json.dumps(recorded_events(folder))
    run.wandb_id()
    saved_step(folder)
    read_notice(folder)
    _why_diverged(folder)
    resolve_classes("1,cat", read_classes(folder), 3)


OWNER = {
    "token": "0" * 16,
    "purpose": "training",
    "host": "a",
    "view": "v",
    "pid": 1,
    "process_start": "1",
    "since": "2026",
    "folder": 5,
    "command": "python x",
    "slurm_cluster": "",
    "slurm_job": "7",
    "slurm_restarts": 0,
    "beat_s": 5.0,
    "beat": 0,
}


@efforts
def test_owner(effort: str) -> None:
    """owner.json: an owner, or nobody's."""
    me = Owner.parse(json.dumps({**OWNER, "slurm_restarts": 1}))
    assert me is not None

    def read(data: bytes) -> None:
        owner = Owner.parse(data.decode("utf-8", "replace"))
        if owner is not None:
            owner.describe(), owner.state(), owner.is_here(), owner.was_requeued_as(me), owner.text()

    hunt(effort, odd_json([OWNER]), read)


@efforts
def test_prompts(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        assert all(text.strip() == text for text in read_prompts(file))

    hunt(
        effort,
        mutated(["a cat\ncafé au lait\r\n\nflag of Lebanon\n".encode(), "\ufeffa cat\n".encode("utf-16-le")]),
        read,
    )


TABLE = "width,log2_lr,fid,seed\n" + "".join(
    f"{width},{lr},{30 + (lr + 10) ** 2 + seed / 10},{seed}\n"
    for width in (64, 128, 256)
    for lr in range(-13, -7)
    for seed in (0, 1)
)


@efforts
def test_a_table_of_scores(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    words = (
        b"nan",
        b"diverged",
        b"<u>53.9</u>",
        b"**1**",
        b"1,000",
        b";",
        b'"',
        b'""',
        b"1e308",
        b"1e-320",
        b"-0",
        b"2^-7",
        b"0",
        b",,,",
    )

    def read(data: bytes) -> None:
        file.write_bytes(data)
        verify_table(file, Columns("width", "log2_lr", "fid", "seed"), lower=True, proxy=64)

    hunt(effort, mutated([TABLE.encode(), TABLE.replace(",", ", ").encode()], words), read, quick=13, long=1500)


@efforts
def test_what_a_score_command_prints(effort: str) -> None:
    printed = [b'{"fid": 12.5}', b'loading\n{"fid": 1e3, "n": 5}\n']

    def read(data: bytes) -> None:
        value = _value(data.decode("utf-8", "replace"), "fid")
        assert value is None or isinstance(value, float)

    hunt(effort, st.one_of(odd_json([{"fid": 12.5}]), mutated(printed)), read, [b'{"fid": 1' + b"0" * 400 + b"}"])
