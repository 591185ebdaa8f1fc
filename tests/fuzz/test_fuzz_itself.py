"""The hunt finds what is planted, and every module that parses files is hunted in."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from helpers.fuzz import hunt as fuzz
from helpers.fuzz.hunt import QUICK, OverTime, hunt, mutated, odd_json
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
_GREED = 2**28  # far above what the process may have free from before, which is held already and no growth
JSON = [{"steps": 1000, "name": "linear", "ends": [0.1, 0.2]}]


def _whole(data: bytes) -> None:
    """A reader as there were many: it takes each value for what it should be."""
    try:
        values = json.loads(data)
    except ValueError:
        raise UserError("it is no JSON; copy it again") from None
    int(values["steps"])


def _once(data: bytes) -> None:
    """A reader whose fault needs one certain byte."""
    if b"\xff" in data:
        raise RuntimeError("unreachable")


def _endless(data: bytes) -> None:
    while True:
        pass


def _greedy(data: bytes) -> None:
    assert len(bytearray(b"\1") * _GREED) == _GREED


def _silent(data: bytes) -> None:
    raise UserError(" ")


@pytest.mark.parametrize(
    ("read", "raised"),
    [
        (_whole, (KeyError, TypeError, ValueError, RecursionError, AttributeError)),
        (_once, RuntimeError),
        (_endless, OverTime),
        (_greedy, AssertionError),
        (_silent, AssertionError),
    ],
)
def test_a_planted_fault_is_found(
    read: Callable[[bytes], object], raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if read is _endless:
        monkeypatch.setattr(fuzz, "MOST_S", 0.2)
    if read is _greedy and not fuzz.peak_begins_anew():
        pytest.skip("the kernel does not let a process's peak of memory begin anew: growth below it is not seen here")
    monkeypatch.setattr(fuzz, "MOST_BYTES", 2**25)
    with pytest.raises(raised):
        hunt(QUICK, st.one_of(odd_json(JSON), mutated([b"a sound file"])), read)


def test_known_files_come_first() -> None:
    seen = []
    with pytest.raises(ZeroDivisionError):
        hunt(QUICK, st.just(b""), lambda data: seen.append(data) or 1 // len(data), known=[b"a", b""])
    assert seen == [b"a", b""]


def test_a_refusal_is_no_fault() -> None:
    def read(data: bytes) -> None:
        raise UserError("it is wrong; mend it")

    hunt(QUICK, st.binary(), read)


# Calls by which a module of megadit parses what a file holds.
PARSING = re.compile(
    r"(?<![\w.])(?<!def )(json\.loads?|parse_json|Fields\.of_(file|bytes)|parse_yaml|read_yaml|torch\.load|safe_open|"
    r"load_file|Image\.open|"
    r"tarfile\.open|np\.load|np\.lib\.format\.read_array|read_array|np\.loadtxt|csv\.(DictR|r)eader|sqlite3\.connect|"
    r"gzip\.open|np\.frombuffer|struct\.unpack|\w+\.from_pretrained)\("
)
# The tests that hunt in each module that does.
HUNTED = {
    "config": (
        "config/deepspeed/file.py",
        "files/json_fields.py",
        "files/json_text.py",
        "config/loading/sources.py",
        "search/study/spec.py",
    ),
    "study": ("search/storage/identity.py", "search/study/study.py"),
    "run_dir": (
        "diffusion/sampling/classes.py",
        "files/owner_file.py",
        "compare/curves.py",
        "transfer/score_table.py",
        "search/workers/scores.py",
        "search/workers/trial.py",
        "train/divergence.py",
        "train/run_dir.py",
    ),
    "checkpoint": (
        "checkpoint/format.py",
        "checkpoint/read.py",
        "checkpoint/fragment_files.py",
        "checkpoint/fragment_reader.py",
        "train/resume.py",
    ),
    "data": (
        "data/sources/fashion_mnist.py",
        "data/sources/image_folder/metadata.py",
        "data/shards/index.py",
        "data/shards/manifest.py",
        "data/shards/members.py",
        "data/shards/scanning.py",
        "data/shards/tar_set.py",
    ),
    "images": ("data/image_files.py",),
    "weights": (
        "convert/safetensors_file.py",
        "convert/state_dicts.py",
        "convert/torch_files/safe_load.py",
        "convert/torch_files/placeholders.py",
    ),
    "torch_trees": (
        "convert/deepspeed/files.py",
        "convert/deepspeed/native.py",
        "convert/deepspeed/universal.py",
    ),
    "model_folders": (
        "convert/diffusers/folder.py",
        "convert/diffusers/index.py",
        "data/codecs/folder.py",
        "data/features/folders.py",
        "data/codecs/pca.py",
        "data/text/folders.py",
        "files/weight_files.py",
    ),
    "small_files": (
        "data/features/encoders.py",
        "data/conditions.py",
        "data/text/feature_table.py",
        "evaluate/pictures.py",
        "files/file_kind.py",
    ),
}
# Those that read nothing of a user's, or leave it to a library whose every error they tell.
NOT_HUNTED = {
    "evaluate/metrics/clip_heads.py": "a cache of its own, made anew where it cannot be read",
    "cli/convert_checkpoint.py": "a hint that somebody typed as an option",
    "data/sources/digits.py": "a table of scikit-learn",
    "data/codecs/vae.py": "diffusers builds the autoencoder, and whatever it raises is told",
}


def parsing_modules() -> set[str]:
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "megadit").rglob("*.py")}
    return {path.relative_to(ROOT / "megadit").as_posix() for path, text in sources.items() if PARSING.search(text)}


def test_every_module_that_parses_files_is_hunted_in() -> None:
    known = {module for modules in HUNTED.values() for module in modules} | NOT_HUNTED.keys()
    assert parsing_modules() - known == set(), "name the hunt in them: HUNTED of this file"
    assert known - parsing_modules() == set(), "these parse nothing any more"


@pytest.mark.parametrize("name", HUNTED)
def test_a_hunt_runs_in_the_quick_and_in_the_slow_set(name: str) -> None:
    text = (ROOT / "tests" / "fuzz" / f"test_fuzz_{name}.py").read_text(encoding="utf-8")
    tests = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and "hunt(" in ast.unparse(node)
    ]
    assert tests
    for test in tests:
        assert "efforts" in {ast.unparse(mark) for mark in test.decorator_list}, test.name
