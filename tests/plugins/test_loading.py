"""Which modules are imported as plugins, and what is said of those that are none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.plugins import plugins_taken_back, write_plugin
from megadit.config import load, load_config, save_config
from megadit.errors import UserError
from megadit.extensions import SCHEDULES
from megadit.plugins import load_plugins, loaded_plugins, plugin_names, require_imported

ROOT = Path(__file__).resolve().parents[2]
TOY = """
from megadit.extensions import SCHEDULES
__version__ = "1.5"
def register():
    SCHEDULES.add("half", lambda step, schedule: 0.5)
"""
DIGITS = "base: {root}/configs/quickstart/digits.yaml\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a plugin in it."""
    monkeypatch.chdir(tmp_path)
    write_plugin(tmp_path, TOY)
    with plugins_taken_back():
        yield tmp_path


def config(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(DIGITS.format(root=ROOT) + text, encoding="utf-8")
    return file


def test_what_a_plugin_brings_is_there_once_it_is_imported(home: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.schedule: 'half' is not one of .*--plugins MODULE"):
        load_config(None, ["optim.schedule=half"])
    load_plugins(["toy_plugin"])
    load_plugins(["toy_plugin"])  # once
    assert load_config(None, ["optim.schedule=half"]).optim.schedule == "half"
    assert SCHEDULES.get("half")(3, None) == 0.5
    (plugin,) = loaded_plugins()
    assert (plugin.name, plugin.version, len(plugin.sha256)) == ("toy_plugin", "1.5", 64)
    assert str(plugin) == f"toy_plugin 1.5 (sha256 {plugin.sha256[:12]})"


def test_modules_are_listed_with_commas_and_by_repeating_the_option() -> None:
    assert plugin_names(["a,b", " c ", "d,"]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("option", ["", ",", " , "])
def test_an_option_that_names_no_module_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"^--plugins: '[ ,]*' names no module; give one or more, or leave the option"):
        plugin_names(["a", option])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("toy_plugin.py", "", r"'toy_plugin\.py' is not the name of a Python module; write toy_plugin$"),
        ("./toy", "", r"'\./toy' is not the name of a Python module; write it as import does"),
        ("broken_plugin", None, r"there is no module broken_plugin on PYTHONPATH or in the current folder; correct"),
        ("toy_plugin.more", "", r"there is no module toy_plugin\.more on PYTHONPATH"),
        ("broken_plugin", "\nx = 1 / 0", r"cannot be imported \(\S+broken_plugin\.py, line 4: ZeroDivisionError: div"),
        ("broken_plugin", "def", r"cannot be imported \(SyntaxError: invalid syntax \(broken_plugin\.py, line 3\)\)$"),
        ("broken_plugin", "import no_such_package", r"line 3: ModuleNotFoundError: No module named 'no_such_package'"),
        ("broken_plugin", "import sys\nsys.exit(4)", r"line 4: SystemExit: 4"),
        ("broken_plugin", "register = 3", r"broken_plugin \(\S+\) is no plugin: it has no register\(\); docs/ext"),
        ("broken_plugin", "def register():\n    1 / 0", r"cannot be registered \(\S+, line 4: ZeroDivisionError: "),
        (
            "broken_plugin",
            "from megadit.extensions import SCHEDULES\ndef register():\n    SCHEDULES.add('wsd', None)",
            r"broken_plugin cannot be registered: schedule 'wsd': there is one of that name already; choose another",
        ),
    ],
)
def test_what_is_no_plugin_is_refused_with_its_line(home: Path, name: str, text: str | None, said: str) -> None:
    if text:
        write_plugin(home, text, "broken_plugin")
    with pytest.raises(UserError, match=rf"^--plugins: .*{said}") as raised:
        load_plugins([name])
    assert "\n" not in str(raised.value) and loaded_plugins() == ()


@pytest.mark.parametrize("name", ["sys", "broken_plugin"])
def test_a_module_without_a_file_is_no_plugin(home: Path, name: str) -> None:
    (home / "broken_plugin").mkdir()  # a folder without __init__.py
    with pytest.raises(UserError, match=rf"^--plugins: {name} \(no file of Python's\) is no plugin: it has no"):
        load_plugins([name])


def test_two_plugins_that_take_one_name(home: Path) -> None:
    write_plugin(home, TOY, "other_plugin")
    with pytest.raises(UserError, match=r"other_plugin cannot be registered: schedule 'half': there is one"):
        load_plugins(["toy_plugin", "other_plugin"])


class TestDigest:
    def test_it_is_that_of_the_source_wherever_it_lies(self, home: Path) -> None:
        load_plugins(["toy_plugin"])
        data = (home / "toy_plugin.py").read_bytes()
        expected = hashlib.sha256(f"toy_plugin.py\0{len(data)}\0".encode() + data).hexdigest()
        assert loaded_plugins()[0].sha256 == expected

    def test_a_package_counts_with_all_of_its_python_files(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digests = []
        for part, text in (("a", "X = 1"), ("b", "X = 1"), ("c", "X = 2")):
            package = home / part / "other_plugin"
            (package / "inner").mkdir(parents=True)
            (package / "__init__.py").write_text("def register():\n    pass\n")
            (package / "inner" / "model.py").write_text(text)
            (package / "notes.txt").write_text(part)
            (package / "main.py").write_text("def register():\n    pass\n")
            with plugins_taken_back(), monkeypatch.context() as patch:
                patch.syspath_prepend(str(home / part))
                load_plugins(["other_plugin", "other_plugin.main"])
                plugin, module = loaded_plugins()
                assert plugin.sha256 == module.sha256  # a module of a package is nothing without the rest
                digests.append(plugin.sha256)
        assert digests[0] == digests[1] != digests[2]

    def test_a_module_in_a_folder_that_is_no_package_counts_alone(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for part in ("here", "there", "path/other_plugin"):
            (home / part).mkdir(parents=True)
        (home / "here" / "unrelated.py").write_text("")
        data = b"def register():\n    pass\n"
        (home / "path" / "other_plugin" / "main.py").write_bytes(data)
        for part in ("here", "there"):
            with plugins_taken_back(), monkeypatch.context() as patch:
                patch.syspath_prepend(str(home / "path"))
                patch.chdir(home / part)
                load_plugins(["other_plugin.main"])
                digest = hashlib.sha256(f"main.py\0{len(data)}\0".encode() + data).hexdigest()
                assert loaded_plugins()[0].sha256 == digest


class TestConfiguration:
    """The ``plugins`` of a file are imported for training alone, and only if a person wrote the file."""

    def test_the_config_of_a_training_may_name_plugins(self, home: Path) -> None:
        file = config(home, "plugins: [toy_plugin]\noptim: {schedule: half}\n")
        with pytest.raises(UserError, match=r"^plugins: run\.yaml names toy_plugin, and reading it imports nothing; "):
            load_config(file)
        assert not (home / "imported").exists()
        loaded_config = load(file, may_import=True).config
        assert [plugin.model_dump() for plugin in loaded_config.plugins] == [vars(loaded_plugins()[0])]
        save_config(loaded_config, home / "saved.yaml")
        assert load_config(home / "saved.yaml") == loaded_config

    def test_a_file_that_megadit_wrote_is_no_reason(self, home: Path) -> None:
        file = config(home, "plugins: [toy_plugin]\n")
        with plugins_taken_back():
            save_config(load(file, may_import=True).config, home / "saved.yaml")
        (home / "imported").unlink()
        with pytest.raises(UserError, match=r"^plugins: saved\.yaml names toy_plugin 1\.5, .* --plugins toy_plugin$"):
            load(home / "saved.yaml", may_import=True)
        assert not (home / "imported").exists()

    def test_neither_is_a_base(self, home: Path) -> None:
        config(home, "plugins: [toy_plugin]\n")
        (home / "more.yaml").write_text("base: run.yaml\n")
        with pytest.raises(UserError, match=r"^plugins: run\.yaml names toy_plugin"):
            load(home / "more.yaml", may_import=True)
        assert not (home / "imported").exists()
        load_plugins(["toy_plugin"])
        assert load_config(home / "more.yaml").plugins[0].name == "toy_plugin"

    @pytest.mark.parametrize("override", ["plugins=[toy_plugin]", "plugins.name=toy_plugin"])
    def test_an_override_is_none(self, home: Path, override: str) -> None:
        with pytest.raises(UserError, match=r"^plugins: .* cannot be an override; give it as --plugins MODULE$"):
            load(None, [override], may_import=True)
        assert not (home / "imported").exists()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("toy_plugin", r"'toy_plugin' is not a list of modules; write plugins: \[my_plugin\]"),
            ("[3]", r"'3' is not the name of a Python module"),
            ("[{path: /x}]", r"is not the name of a module"),
        ],
    )
    def test_what_is_no_list_of_names(self, home: Path, text: str, said: str) -> None:
        with pytest.raises(UserError, match=rf"^plugins.*: .*{said}"):
            load(config(home, f"plugins: {text}\n"), may_import=True)

    def test_several_that_are_missing_are_named_in_one_sentence(self) -> None:
        records = [{"name": "a", "version": "1", "sha256": ""}, {"name": "b", "version": "", "sha256": "0"}]
        with pytest.raises(UserError, match=r"^plugins: RUN names a 1 and b, and .* give --plugins a,b$"):
            require_imported(records, "RUN")

    def test_the_option_that_is_told_is_whole(self, home: Path) -> None:
        """Those that were given stand in it, too."""
        load_plugins(["toy_plugin"])
        records = [{"name": name, "version": "", "sha256": ""} for name in ("toy_plugin", "b")]
        with pytest.raises(UserError, match=r"^plugins: RUN names b, and .* give --plugins toy_plugin,b$"):
            require_imported(records, "RUN")


def test_the_current_folder_is_looked_in_last(home: Path) -> None:
    """So that a file of it shadows nothing, even under ``python -m``, which puts the folder first."""
    (home / "sitelike").mkdir()
    write_plugin(home / "sitelike", TOY)
    code = "from megadit.plugins import load_plugins\nload_plugins(['toy_plugin'])\n"
    (home / "starter.py").write_text(code)
    run = [sys.executable, "-m", "starter"]
    path = f"{ROOT}:{ROOT / 'kernels'}:{home / 'sitelike'}"
    done = subprocess.run(run, env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (home / "sitelike" / "imported").exists() and not (home / "imported").exists()
