"""Bad input to a command: tables of cases, each of which must end in one sentence and leave every file as it was."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from megadit.errors import run_command

Content = str | bytes | None  # of a file; None: a folder


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    ``arguments`` are what a person types, words separated by spaces; ``says`` are parts of the sentence that must come;
    ``files`` are made before, by path in the folder where the command starts; ``breaks`` is called with that folder
    after them.
    """

    kind: str
    arguments: str
    says: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    breaks: Callable[[Path], object] = lambda folder: None


def case(
    kind: str,
    arguments: str,
    *says: str,
    files: Mapping[str, Content] | None = None,
    breaks: Callable[[Path], object] = lambda folder: None,
) -> Case:
    """A row of a table."""
    return Case(kind, arguments, says, files or {}, breaks)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrize a test over ``cases``, named by their kinds."""
    return pytest.mark.parametrize("bad", cases, ids=[bad.kind for bad in cases])


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with a digest of its content, every folder and link by what it is."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            contents[name] = f"link to {os.readlink(path)}"
        else:
            contents[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


def make_run(folder: Path) -> None:
    """A run directory of two steps of a tiny DiT on digits, as a rank of it writes it."""
    from helpers.ranks import run_ranks
    from helpers.training import small_config, train_rank

    config = small_config(train={"steps": 2}, model={"depth": 1}, ema={"decays": (0.9,)}, optim={"warmup_steps": 0})
    run_ranks(1, train_rank, config, str(folder))
    rows = [{"step": step, "loss": 1.0 / step, "samples_seen": 16 * step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@functools.cache
def script(path: str) -> ModuleType:
    """A script of launch/ or tools/ as a module."""
    return importlib.import_module(f"megadit.cli.{Path(path).stem}")


Refused = Callable[[str, Case], str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """``refused("tools/x.py", bad)``: run the command in a new folder and return its sentence.

    Asserts exit code 2, nothing on stdout, one error line on stderr (argparse's usage may precede it, notes may too),
    no traceback, and that no file was made, changed or removed.
    """
    folder = tmp_path / "here"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)

    def run(command: str, bad: Case) -> str:
        for name, content in bad.files.items():
            path = folder / name
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        bad.breaks(folder)
        before = tree(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(script(command).main, bad.arguments.split())
        out, err = capfd.readouterr()
        assert ended.value.code == 2, f"exit code {ended.value.code}\n{out}\n{err}"
        assert not out, f"stdout: {out}"
        assert "Traceback" not in err, err
        sentences = [line for line in err.splitlines() if "error: " in line]
        others = [line for line in err.splitlines() if "error: " not in line and not _may_precede(line)]
        assert len(sentences) == 1 and not others, err
        for part in bad.says:
            assert part in sentences[0], f"{part!r} is not in: {sentences[0]}"
        after = tree(folder)
        assert after == before, f"changed on disk: {sorted(after.items() ^ before.items())}"
        return sentences[0]

    return run


def _may_precede(line: str) -> bool:
    return not line.strip() or line.startswith(("usage: ", "note: ", "warning: ", " "))
