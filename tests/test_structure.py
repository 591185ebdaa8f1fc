"""Rules of the repository that a program can hold: who imports whom, sizes, nothing unsafe, nothing unfinished."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadit.models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megadit", "kernels", "launch", "tools", "tests", "benchmarks")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 90

FOUNDATIONS = {
    "errors", "extensions", "files", "finite", "keys", "lazy", "nested", "registry", "rng", "optional", "tables",
    "conditioning", "plugins", "slices", "streams", "__version__",
}  # fmt: skip
# What each part of megadit may import, its own modules and the foundations aside, in the order of dependence: nothing
# here points downwards.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "data": {"config"},
    "diffusion": {"config", "data", "kernels"},
    "parallel": {"config"},
    "mup": {"config", "parallel"},
    "models": {"config", "data", "diffusion", "mup", "parallel", "kernels"},
    "plan": {"config", "data", "diffusion", "mup", "parallel", "models", "kernels"},
    "engine": {"config", "data", "diffusion", "mup", "parallel", "models", "plan", "kernels"},
    "checkpoint": {"config", "data", "mup", "parallel", "models", "engine"},
    "train": {"config", "data", "diffusion", "mup", "parallel", "models", "plan", "engine", "checkpoint", "kernels"},
    "transfer": {"config"},
}
# Parts that use the whole of the above, and not one another, may be added here; the commands use them all.
APPLICATIONS = {"compare", "doctor", "search", "evaluate", "convert"}
COMMANDS = {"cli", "__main__"}

# Folders of tests that are about no one room, with what their tests are about.
ACROSS = {
    "bad_input": "every command given what it must refuse",
    "benchmarks": "the scripts of benchmarks/",
    "fuzz": "every reader given damaged files",
    "helpers": "the helpers of the tests themselves",
    "kernels": "the package megadit_kernels",
    "pins": "what users rely on from one version to the next",
    "plugins": "a user's own parts",
}
# Test files that stand in no folder: a foundation of the same name, or the repository as a whole.
OF_THE_REPOSITORY = {"documents", "packaging", "structure", "troubleshooting"}
# Rooms whose folders follow one grammar, so that a file of the same name plays the same part in each.
ONE_GRAMMAR = {
    "models": {"family", "model", "presets", "init", "convert"},  # the families
    "data": {"encoders", "folders"},  # text and features: networks of others
    "engine": {"pipeline"},  # the engine, and the DeepSpeed class that it is made of
}
SHIM = '''#!/usr/bin/env python
"""``python -m megadit {name}`` without installing: see megadit/cli/{name}.py."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

from megadit.cli.main import run  # noqa: E402

if __name__ == "__main__":
    run("{name}")
'''

LAZY = {"deepspeed", "diffusers", "transformers", "matplotlib", "sklearn", "scipy", "optuna", "wandb", "tensorboard"}
PUBLIC_DEEPSPEED = {"deepspeed", "deepspeed.accelerator", "deepspeed.ops.adam"}
DEEPSPEED_INTERNALS = re.compile(
    r"\b(single_partition_of_fp32_groups|fp32_partitioned_groups_flat|fp32_groups_flat_partition|bit16_groups|"
    r"params_in_partition|averaged_gradients|_hp_mapping|load_hp_checkpoint_state|ds_tensor|ds_id|ds_status)\b"
)
BUILT_IN_FAMILIES = set(FAMILIES)
DEEPSPEED_DOOR = "megadit/engine/deepspeed/"
NAMES_IN_FILES = "megadit/convert/deepspeed/native.py"  # keys of its checkpoints are called like attributes
WRITING = "from pickle import Pickler"  # which reads nothing; torch files are pickles
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + r"Error")


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module, by its full name; ``from megadit import rng`` gives megadit.rng."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module in ("megadit", "megadit_kernels"):
                yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
            else:
                yield "." * node.level + (node.module or ""), node


def part_of(path: str) -> str:
    """The part of megadit that a file belongs to: megadit/data/order.py -> data, megadit/rng.py -> rng."""
    return Path(path).parts[1].removesuffix(".py")


def direction(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith("kernels/"):
        yield from (f"kernels import {name}" for name, _ in imports(tree) if name.split(".")[0] == "megadit")
    if not path.startswith("megadit/"):
        return
    part = part_of(path)
    if part == "__init__":
        allowed: set[str] = set()
    elif part in FOUNDATIONS:
        allowed = FOUNDATIONS | ({"kernels"} if part == "rng" else set())  # Philox has a kernel of its own
    elif part in COMMANDS:
        allowed = {*MAY_IMPORT, *APPLICATIONS, *COMMANDS, *FOUNDATIONS, "kernels"}
    elif part in APPLICATIONS:
        allowed = {*MAY_IMPORT, *FOUNDATIONS, "kernels", part}
    elif part in MAY_IMPORT:
        allowed = MAY_IMPORT[part] | FOUNDATIONS | {part}
    else:
        yield f"megadit/{part} is not in the table of this test: say there what it may import"
        return
    for name, _ in imports(tree):
        if name.startswith("."):
            yield f"imports {name}: write the full name"
        pieces = name.split(".")
        target = "kernels" if pieces[0] == "megadit_kernels" else pieces[1] if pieces[0] == "megadit" else None
        if target is not None and target not in allowed:
            yield f"{part} imports {name}"


def deepspeed_use(path: str, tree: ast.Module) -> Iterator[str]:
    if path.split("/")[0] not in ("megadit", "kernels", "launch", "tools"):
        return
    for name, _ in imports(tree):
        if name.split(".")[0] != "deepspeed" or path.startswith(DEEPSPEED_DOOR):
            continue
        if not path.startswith(("megadit/engine/", "megadit/doctor/")):
            yield f"imports {name}: only megadit/engine (and the doctor) knows DeepSpeed"
        elif name not in PUBLIC_DEEPSPEED:
            yield f"imports {name}: DeepSpeed's internals belong to {DEEPSPEED_DOOR}"
    if path != NAMES_IN_FILES and not path.startswith(DEEPSPEED_DOOR):
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for name in sorted(names):
            if DEEPSPEED_INTERNALS.fullmatch(name):
                yield f"uses {name}: DeepSpeed's internals belong to {DEEPSPEED_DOOR}"


def lazy_imports(path: str, tree: ast.Module) -> Iterator[str]:
    if path.split("/")[0] not in ("megadit", "kernels", "launch", "tools"):
        return
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    guarded = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for name, node in imports(tree):
        if name.split(".")[0] in LAZY and id(node) not in inside | guarded:
            yield f"imports {name} at module level: do it inside the function that needs it"


def unsafe(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith(("tests/", "benchmarks/")):
        return
    yield from (
        f"imports {name}"
        for name, node in imports(tree)
        if name.split(".")[0] in {"pickle", "dill", "cloudpickle"} and ast.unparse(node) != WRITING
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec"):
            yield f"calls {called}"
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if called == "torch.load" and not safe:
            yield "calls torch.load without weights_only=True"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            loaders = [ast.unparse(value) for value in [*node.args[1:], *(k.value for k in node.keywords)]]
            # A loader of our own derives from SafeLoader; the library's others build any Python object.
            if called != "yaml.load" or not loaders or any(re.fullmatch(r"yaml\..*", loader) for loader in loaders):
                yield f"calls {called}: use yaml.safe_load, or a loader derived from SafeLoader"


def compilers(path: str, tree: ast.Module) -> Iterator[str]:
    """A variable that no option of torch overrules switches compilation off in tests: they would compile nothing."""
    if path.startswith("tests/") and path != "tests/helpers/compiler.py":
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node).endswith("_dynamo.config.patch(disable=False)"):
                yield f"line {node.lineno}: torch.compile stays off by its variable; use helpers.compiler.compiling"


def encodings(path: str, tree: ast.Module) -> Iterator[str]:
    """Text is UTF-8 whatever the locale, so every file and pipe that is read or written as text says so."""
    if path.startswith("tests/"):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = ast.unparse(node.func).rpartition(".")[2]
        owner = ast.unparse(node.func).rpartition(".")[0]
        if name in ("read_text", "write_text") and len(node.args) <= (name == "write_text"):
            yield f"line {node.lineno}: {name} without encoding='utf-8'"
        elif name == "open" and owner not in ("os", "Image", "tarfile", "zipfile"):
            position = 0 if method and owner != "gzip" else 1
            modes = [ast.unparse(m) for m in [*node.args[position : position + 1], *_given(node, "mode")]] or ["'r'"]
            if not any("b" in mode for mode in modes) and (owner != "gzip" or any("t" in mode for mode in modes)):
                yield f"line {node.lineno}: open without encoding='utf-8'"
        elif name in ("run", "Popen", "check_output") and _given(node, "text"):
            yield f"line {node.lineno}: text=True without encoding='utf-8'"


def _given(call: ast.Call, name: str) -> list[ast.expr]:
    return [k.value for k in call.keywords if k.arg == name]


def sizes(path: str, tree: ast.Module, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"has {lines} lines, more than {MAX_FILE_LINES}: one subject a file"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"


def families_by_name(path: str, tree: ast.Module) -> Iterator[str]:
    """A family is known by its spec: its name stands in its own folder, and in the list of folders."""
    if not path.startswith("megadit/") or path == "megadit/models/__init__.py":
        return
    for node in ast.walk(tree):
        name = node.value if isinstance(node, ast.Constant) else None
        if name in BUILT_IN_FAMILIES and not path.startswith(f"megadit/models/{name}/"):
            yield f"line {node.lineno} asks for the family {name} by name: ask its FamilySpec"


def violations(path: str, text: str) -> list[str]:
    """Everything wrong with one file, as sentences."""
    tree = ast.parse(text)
    broken = [*direction(path, tree), *deepspeed_use(path, tree), *lazy_imports(path, tree), *unsafe(path, tree)]
    broken += [*encodings(path, tree), *sizes(path, tree, text), *families_by_name(path, tree)]
    broken += compilers(path, tree)
    broken += [f"unfinished: {match.group(0)}" for match in UNFINISHED.finditer(text)]
    return broken


@pytest.mark.parametrize("folder", FOLDERS)
def test_rules_hold(folder):
    broken = {
        name: bad
        for path in sources()
        if (name := path.relative_to(ROOT).as_posix()).startswith(f"{folder}/")
        and (bad := violations(name, path.read_text(encoding="utf-8")))
    }
    assert not broken, "\n".join(f"{name}: {'; '.join(bad)}" for name, bad in broken.items())


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("megadit/data/x.py", "from megadit.models import build_model", "data imports megadit.models"),
        ("megadit/mup/x.py", "def f():\n    import megadit.engine.engine", "mup imports megadit.engine.engine"),
        ("megadit/rng.py", "from megadit import config", "rng imports megadit.config"),
        ("megadit/slices.py", "from megadit_kernels import swiglu", "slices imports megadit_kernels.swiglu"),
        ("megadit/data/x.py", "from .order import SampleOrder", "write the full name"),
        ("megadit/search/x.py", "from megadit.evaluate import fid", "search imports megadit.evaluate"),
        ("megadit/novel/x.py", "", "megadit/novel is not in the table"),
        ("kernels/megadit_kernels/x.py", "from megadit.errors import UserError", "kernels import megadit.errors"),
        ("megadit/models/x.py", "def f():\n    import deepspeed", "only megadit/engine"),
        ("megadit/engine/x.py", "def f():\n    from deepspeed.runtime.zero import stage3", "internals belong"),
        ("megadit/train/x.py", "def f(e):\n    return e.optimizer.bit16_groups", "uses bit16_groups"),
        ("megadit/train/x.py", "def f(p):\n    return getattr(p, 'ds_tensor', p)", "uses ds_tensor"),
        ("megadit/engine/x.py", "import deepspeed", "at module level"),
        ("tools/x.py", "from matplotlib import pyplot", "at module level"),
        ("megadit/train/x.py", "import pickle", "imports pickle"),
        ("megadit/train/x.py", "from pickle import Pickler, loads", "imports pickle"),
        ("tools/x.py", "print(eval('1'))", "calls eval"),
        ("megadit/train/x.py", "import torch\ntorch.load('x', weights_only=False)", "weights_only"),
        ("megadit/config/x.py", "import yaml\nyaml.load('x')", "safe_load"),
        ("megadit/config/x.py", "import yaml\nyaml.load('x', Loader=yaml.FullLoader)", "safe_load"),
        ("megadit/train/x.py", "def f(path):\n    return path.read_text()", "read_text without encoding"),
        ("tools/x.py", "def f(path):\n    path.write_text('x')", "write_text without encoding"),
        ("megadit/data/x.py", "def f(path):\n    return open(path, 'w')", "open without encoding"),
        ("megadit/data/x.py", "import gzip\ngzip.open('x', 'rt')", "open without encoding"),
        ("megadit/data/x.py", "def f(path):\n    return path.open()", "open without encoding"),
        ("megadit/doctor/x.py", "import subprocess\nsubprocess.run(['x'], text=True)", "text=True without encoding"),
        ("launch/x.py", "x = 1\n" * 601, "601 lines"),
        ("tests/x.py", "def f():\n" + "    x = 1\n" * 90, "f has 91 lines"),
        ("tools/x.py", "# TO" + "DO later", "unfinished"),
        ("megadit/data/x.py", "def f():\n    raise NotImplemented" + "Error", "unfinished"),
        ("tests/x.py", "with torch._dynamo.config.patch(disable=" + "False):\n    pass", "torch.compile stays off"),
        ("megadit/data/x.py", "def f(c):\n    return c.family == 'dit'", "asks for the family dit by name"),
        ("megadit/models/dit/x.py", "OF = {'uvit': 1}", "asks for the family uvit by name"),
    ],
)
def test_each_rule_can_fail(path, text, complaint):
    assert any(complaint in broken for broken in violations(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "megadit/engine/deepspeed/partitions.py",
            "def f(e):\n    import deepspeed.runtime.zero\n    return e.bit16_groups",
        ),
        ("megadit/engine/engine.py", "def f():\n    import deepspeed\n    deepspeed.initialize()"),
        ("megadit/models/dit/model.py", "from megadit_kernels import scaled_linear\nfrom megadit.mup import ParamSpec"),
        ("megadit/data/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("tests/x.py", "import pickle, deepspeed.runtime"),
        ("megadit/convert/x.py", "from pickle import Pickler"),
        (
            "megadit/data/x.py",
            "def f(path):\n    return open(path, 'rb'), path.open(mode='wb'), path.read_text('utf-8')",
        ),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert violations(path, text) == []


def test_the_table_of_parts_has_no_cycle():
    done: set[str] = set()
    while ready := [p for p, needs in MAY_IMPORT.items() if p not in done and needs - {"kernels"} <= done]:
        done.update(ready)
    assert done == set(MAY_IMPORT)


def test_folders_of_tests_are_no_packages():
    plugin = ROOT / "tests" / "plugins" / "toy"
    assert [path.parent for path in (ROOT / "tests").rglob("__init__.py")] == [plugin]


def test_scripts_are_shims_of_their_commands():
    for path in [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert path.read_text(encoding="utf-8") == SHIM.format(name=path.stem), f"{path.name}: commands stand in cli"
        assert (ROOT / "megadit" / "cli" / path.name).is_file()


def modules() -> dict[str, ast.Module]:
    """The modules of megadit by their full names."""
    trees = {}
    for path in (ROOT / "megadit").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def targets(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of megadit that one imports anywhere, also inside functions and for types alone."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= inner & known or {node.module}
    return imported & known


def circles(imported: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import one another, through whatever others: sets of two and more."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = imported[left.pop()] - seen
            seen |= new
            left += new
        return seen

    all_reached = {name: reached(name) for name in imported}
    groups = {frozenset(other for other in r if name in all_reached[other]) for name, r in all_reached.items()}
    return [set(circle) for circle in groups if len(circle) > 1]


def test_no_modules_import_one_another_in_a_circle():
    trees = modules()
    broken = circles({name: targets(tree, set(trees)) for name, tree in trees.items()})
    assert not broken, f"these import one another, at module level or inside functions: {broken}"


def test_a_circle_is_noticed():
    imported = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(imported) == [{"b", "c"}]
    tree = ast.parse("def f():\n    from megadit.x import y, z\nif TYPE_CHECKING:\n    import megadit.w")
    assert targets(tree, {"megadit.x", "megadit.x.y", "megadit.w"}) == {"megadit.x.y", "megadit.w"}


def test_a_name_says_one_thing_in_its_room():
    """Two files of one name in a part of megadit are two answers to where a subject stands."""
    for part in {path.parts[0] for path in in_package()}:
        names = [path.stem for path in in_package() if path.parts[0] == part and path.stem != "__init__"]
        twice = {name for name in names if names.count(name) > 1} - ONE_GRAMMAR.get(part, set())
        assert not twice, f"megadit/{part} has several files called {', '.join(sorted(twice))}"


def in_package() -> list[Path]:
    return [path.relative_to(ROOT / "megadit") for path in (ROOT / "megadit").glob("*/**/*.py")]


def test_every_package_says_what_is_in_it():
    for path in (ROOT / "megadit").rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert len(docstring.split()) > 4, f"{path.relative_to(ROOT)}: say in its docstring what stands in the package"


def files_of_tests() -> list[Path]:
    return sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py"))


def misplaced(path: Path) -> str | None:
    """What is wrong with where a file of tests stands, ``path`` being relative to tests/."""
    room, subject = path.parent, path.stem.removeprefix("test_")
    if room == Path():
        right = subject in FOUNDATIONS | OF_THE_REPOSITORY
        return None if right else "stands in no folder, and megadit has no foundation of its name"
    right = room.parts[0] in ACROSS or (ROOT / "megadit" / room).is_dir()
    return None if right else f"tests/{room} mirrors no folder of megadit"


def test_tests_mirror_the_package():
    wrong = {str(path): reason for path in files_of_tests() if (reason := misplaced(path))}
    assert not wrong, "\n".join(f"tests/{path}: {reason}" for path, reason in wrong.items())
    assert all((ROOT / "tests" / folder).is_dir() for folder in ACROSS)


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("test_rng.py", True),
        ("test_packaging.py", True),
        ("test_order.py", False),
        ("data/test_order.py", True),
        ("fuzz/test_order.py", True),
        ("orders/test_order.py", False),
    ],
)
def test_a_misplaced_file_of_tests_is_noticed(path, right):
    assert (misplaced(Path(path)) is None) == right


def behaviour(text: str) -> str | None:
    """What is wrong with how a file of tests says which behaviour it holds."""
    sentence = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    if len(sentence.split()) < 4 or not sentence.endswith("."):
        return "begin with a docstring whose first paragraph is one sentence: the behaviour that its tests hold"
    return None


def test_every_file_of_tests_says_which_behaviour_it_holds():
    texts = {path: (ROOT / "tests" / path).read_text(encoding="utf-8") for path in files_of_tests()}
    wrong = {path: reason for path, text in texts.items() if (reason := behaviour(text))}
    assert not wrong, "\n".join(f"tests/{path}: {reason}" for path, reason in wrong.items())
    firsts = [ast.get_docstring(ast.parse(text)) for text in texts.values()]
    assert len(set(firsts)) == len(firsts), "two files of tests say the same of themselves"


@pytest.mark.parametrize("text", ["import torch", '"""Tests."""', '"""What order samples come in, and why"""'])
def test_a_file_of_tests_that_says_nothing_is_noticed(text):
    assert behaviour(text)


def test_helpers_are_all_used():
    """A helper that nothing imports is dead, one that only a single file of tests needs may stand in it."""
    sources_of_tests = {path: path.read_text(encoding="utf-8") for path in sources()}
    for helper in (ROOT / "tests" / "helpers").rglob("*.py"):
        name = ".".join(helper.relative_to(ROOT / "tests").with_suffix("").parts)
        package, _, last = name.rpartition(".")
        importing = re.compile(
            rf"from {name} import|import {name}\b|from {package} import [^\n]*\b{last}\b|{helper.name}\b"
        )
        if not helper.name.startswith("test_"):
            users = [path for path, text in sources_of_tests.items() if path != helper and importing.search(text)]
            assert users, f"{helper.relative_to(ROOT)} is used by nothing"


def type_alias(node: ast.stmt) -> tuple[str, str] | None:
    """Name and text of a type alias: an assignment to one name in CamelCase."""
    if isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Assign) and len(node.targets) == 1):
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and re.fullmatch(r"_*[A-Z]\w*[a-z]\w*", target.id) and node.value:
            return target.id, ast.unparse(node.value)
    return None


def classes_of_one_name(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """The modules of each name of a class or type alias that stands in several; a leading underscore does not count.

    Aliases of the same text mean the same: mup/spec.py repeats the configuration's roles, which it does not import.
    """
    where: dict[str, dict[str, str]] = {}  # by name and then by what is defined: one module of it
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name.lstrip("_"), {})[f"class of {module}:{node.lineno}"] = module
        for alias in filter(None, map(type_alias, tree.body)):
            where.setdefault(alias[0].lstrip("_"), {}).setdefault(alias[1], module)
    return {name: list(definitions.values()) for name, definitions in where.items() if len(definitions) > 1}


def test_a_class_name_stands_once():
    """A reader who meets a class by its name knows which it is: two that share one are renamed to what each holds."""
    assert classes_of_one_name(modules()) == {}


def test_a_class_name_that_stands_twice_is_noticed():
    texts = {
        "a": "class Point: ...\nclass _Own: ...\nRow = list[int]\nRole = Literal['a']\nLIMIT = 3",
        "b": "class Own: ...\nRow: TypeAlias = list[str]\nRole = Literal['a']\nLIMIT = 4",
        "c": "def f():\n    class Point: ...",
    }
    twins = classes_of_one_name({name: ast.parse(text) for name, text in texts.items()})
    assert twins == {"Point": ["a", "c"], "Own": ["a", "b"], "Row": ["a", "b"]}
