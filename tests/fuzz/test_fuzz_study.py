"""Study files, study directories and their storage: taken, or refused in a sentence; never a traceback."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from helpers.fuzz.hunt import YAML_WORDS, efforts, hunt, json_bytes, mutated, odd_json, odd_values
from helpers.studies.fabricated import fabricate, make_study, store, valley
from megadit.config.loading.sources import configs_dir
from megadit.files.yaml_text import dump_yaml
from megadit.search.status import format_status, status_of
from megadit.search.storage.identity import Heartbeats, this_worker
from megadit.search.storage.store import load_results, open_readonly
from megadit.search.study.plan import plan_trials
from megadit.search.study.study import load_study

STUDIES: list[dict[str, Any]] = [
    {
        "name": "a",
        "base": "quickstart/digits.yaml",
        "overrides": {"train.log_every": 5, "data.val_fraction": 0.1},
        "variants": {"mup": {"model.parametrization": "mup"}, "sp": {"model.parametrization": "sp"}},
        "scale": {"key": "model.width", "values": [32, 64], "proxy": 32},
        "space": {"optim.lr": {"grid": ["2^-9", "2^-8", "2^-7"]}, "optim.clip.value": {"choice": [None, 1.0]}},
        "sampler": "grid",
        "seeds": [0, 1],
        "proxy": {"steps": 200, "batch": 32},
        "scores": [{"name": "loss", "kind": "train_loss", "last": 50}, {"name": "val", "kind": "val_loss"}],
        "select": {"rule": "mean_rank", "score": "loss"},
        "keep": ["checkpoint"],
        "diverged_above": 2.0,
    },
    {
        "base": "quickstart/digits.yaml",
        "space": {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "optim.warmup_steps": {"uniform": [1, 50]}},
        "sampler": "random",
        "trials": 6,
        "sampler_seed": 3,
        "proxy": {"steps": 100},
        "scores": [{"name": "fid", "kind": "command", "command": ["python", "x.py", "{run_dir}"], "key": "fid"}],
        "storage": "journal",
        "workers": {"count": 2, "cores": 1, "gpus": 0},
        "max_attempts": 2,
        "stale_after_s": 60,
    },
    {
        "base": "quickstart/digits.yaml",
        "space": {"optim.weight_decay": {"log_uniform": [1e-4, 1e-2]}},
        "sampler": "tpe",
        "trials": 5,
        "pruning": {"rule": "median", "every": 10, "after": 20},
        "proxy": {"steps": 100},
    },
]


@efforts
def test_a_study_file(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    shipped = [path.read_bytes() for path in sorted((configs_dir() / "sweeps").glob("*mini*.yaml"))]
    written = [dump_yaml(values).encode() for values in STUDIES]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        plan_trials(load_study(file, tmp_path / "here"))

    odd = odd_values(STUDIES, extra=("2^-10", "optim.lr", "train.seed", "model.width", 10**6, 10**9)).map(json_bytes)
    hunt(effort, st.one_of(odd, odd, mutated([*shipped, *written], YAML_WORDS)), read)


@efforts
def test_overrides_of_a_study(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(json_bytes(STUDIES[1]))
    keys = [
        "trials",
        "space",
        "space.optim.lr",
        "scale",
        "scale.values",
        "seeds",
        "workers.count",
        "optim.lr",
        "model",
        "base",
        "variants.a",
        "scores",
    ]
    texts = mutated([b"10", b"[1, 2]", b"{grid: [1, 2]}", b"{key: model.width, values: [32, 64]}", b"null"], YAML_WORDS)
    override = st.builds(
        lambda key, text: f"{key}={text.decode('utf-8', 'surrogateescape')}", st.sampled_from(keys), texts
    )

    def read(overrides: list[str]) -> None:
        plan_trials(load_study(file, tmp_path / "here", overrides))

    hunt(effort, st.lists(override, min_size=1, max_size=3), read)


@pytest.fixture(scope="module", params=["sqlite", "journal"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study in its directory."""
    folder = tmp_path_factory.mktemp(request.param)
    return store(fabricate(make_study(folder, seeds=[0], scale=None, storage=request.param), valley()))


@efforts
def test_a_study_directory(effort: str, made: Path, tmp_path: Path) -> None:
    """study.yaml, the database or the journal is damaged."""
    names = ["study.yaml", "study.db" if (made / "study.db").exists() else "journal.log"]
    whole = {name: (made / name).read_bytes() for name in names}
    folder = tmp_path / "study"
    folder.mkdir()

    def read(drawn: tuple[str, bytes]) -> None:
        damaged, data = drawn
        for name in names:
            (folder / name).write_bytes(data if name == damaged else whole[name])
        look_at(folder)

    words = (
        b'"user_attr"',
        b'"op_code": 8',
        b'{"op_code": 99}\n',
        b"RUNNING",
        b"\x0d",
        b'"result"',
        b"horizons",
        *YAML_WORDS[:6],
    )
    hunt(
        effort,
        st.one_of(*(st.tuples(st.just(name), mutated([whole[name]], words)) for name in (names[1], *names))),
        read,
        quick=8,
    )


def look_at(folder: Path) -> None:
    """What ``status --json``, ``status`` and ``report`` read."""
    store_ = open_readonly(load_study(folder))
    status = status_of(store_)
    json.dumps(status.to_json())
    format_status(status)
    load_results(folder)


@efforts
def test_odd_values_in_a_journal(effort: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Lines of the journal hold other values than were written."""
    made = store(fabricate(make_study(tmp_path, seeds=[0], scale=None, storage="journal"), valley()))
    lines = [json.loads(line) for line in (made / "journal.log").read_text().splitlines()]
    folder = tmp_path / "damaged"
    folder.mkdir()
    shutil.copy(made / "study.yaml", folder)

    def read(values: Any) -> None:
        text = (
            b"".join(json_bytes(value) + b"\n" for value in values) if isinstance(values, list) else json_bytes(values)
        )
        (folder / "journal.log").write_bytes(text)
        look_at(folder)

    hunt(effort, odd_values([lines]), read, quick=8)


@efforts
def test_signs_of_life(effort: str, tmp_path: Path) -> None:
    """Files in ``workers/`` that other hosts write."""
    beats = Heartbeats(tmp_path)
    file = tmp_path / "host-5.alive"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        assert all(worker.label for worker in beats.living(60.0))
        beats.clear_dead()

    hunt(effort, odd_json([asdict(this_worker())]), read)
