"""Documents stay true: links lead somewhere, line anchors point at the code they speak of, what they name exists."""

import fnmatch
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.ranks import ROOT
from megadit.config import RunConfig
from megadit.config.schema.section import Section

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")

# What the lines that README's table links to must contain.
ANCHORED = [
    ('if role == "hidden":', "math.sqrt(base_fan_in / fan_in)"),
    ("lr_mult=hps.lr / ratio if",),
    ('return spec.fan_in_mult if mode == "independent"',),
    ("lr_mult=hps.lr / ratio if",),
    ("std = rule.std(",),
    ("forward_mult = (self.output_mult",),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for link in LINK.findall(document.read_text()):
        if not link.startswith(("http", "#")):
            assert (document.parent / link.split("#")[0]).exists(), link


def test_line_anchors_of_the_readme_point_at_their_code():
    anchors = [link for link in LINK.findall((ROOT / "README.md").read_text()) if "#L" in link]
    assert len(anchors) == len(ANCHORED)
    for link, expected in zip(anchors, ANCHORED, strict=True):
        path, lines = link.split("#")
        first, _, last = lines.replace("L", "").partition("-")
        shown = (ROOT / path).read_text().splitlines()[int(first) - 1 : int(last or first)]
        for text in expected:
            assert any(text in line for line in shown), f"{link} shows {shown}"


# What the lines that the table of docs/mup.md links to must begin with, in the order of the links.
RULES = [
    ("input", "def _role_of"),
    ("constant in width", "std = rule.std("),
    ("input, undecayed", "def _role_of"),
    ("hidden", 'if role == "hidden":'),
    ("σ/√fan_in", 'if role == "hidden":'),
    ("η/m", "lr_mult=hps.lr / ratio if"),
    ("λ·m", "wd_mult=(ratio if"),
    ("output", 'if role == "output" and matrix'),
    ("φ_out/m", 'if role == "output" and matrix'),
    ("output, at random", "_BESIDE_BIAS = "),
    ("1/m", 'if role == "output" and matrix'),
    ("finite", "def _role_of"),
    ("`original`", "ORIGINAL: "),
    ("`fan_in`", "FAN_IN_SCHEME: "),
    ("`authors`", "AUTHORS: "),
]


def test_line_anchors_of_the_mup_table_point_at_their_rules():
    anchors = re.findall(r"\[([^]]+)\]\(\.\./(megadit/[^)]+)#L(\d+)\)", (ROOT / "docs/mup.md").read_text())
    shown = [(words, (ROOT / file).read_text().splitlines()[int(line) - 1].strip()) for words, file, line in anchors]
    assert [words for words, _ in shown] == [words for words, _ in RULES]
    for (words, line), (_, expected) in zip(shown, RULES, strict=True):
        assert line.startswith(expected), f"{words} leads to {line}"


# Files of others, examples, and what runs write.
_NOT_OURS = {"cifar10_uvit.py", "imagenet256_uvit.py", "fid.py"}
_OPTIONS_OF_OTHERS = {"--no-build-isolation", "--nproc_per_node", "--num_gpus", "--ntasks", "--shm-size", "--logdir"}
_OPTIONS_OF_OTHERS |= {"--signal", "--help"}
_OPTIONS_OF_OTHERS |= {"--sort", "--concatenate", "--file", "--dereference", "--hard-dereference"}  # of tar
_NOT_KEYS = {"model.preset", "model.py", "model.safetensors", "model.diffusion_model"}  # files and names of others
PROGRAMS = ("launch", "tools", "benchmarks", "megadit")


def code_of(text: str) -> list[str]:
    """Code spans and the commands and lines of code blocks, lines that end in a backslash joined with the next."""
    blocks = re.findall(r"^```.*?^```", text, re.S | re.M)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [*spans, *(line for block in blocks for line in block.replace("\\\n", " ").splitlines())]


def sources() -> dict[str, str]:
    """Every Python file by its path in the repository."""
    modules = (path for part in (*PROGRAMS, "kernels", "tests") for path in (ROOT / part).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*modules, ROOT / "setup.py")}


SOURCES = sources()


def unknown_files(text: str) -> list[str]:
    """Files of Python, and of configurations by their folder, that are named and are not there."""
    code = "\n".join(code_of(text))
    named = re.findall(r"(?<![\w/.{}*-])(?:[\w*-]+/)*[\w*-]+\.py\b", code)
    missing = [n for n in named if not any(fnmatch.fnmatch(f"/{path}", f"*/{n}") for path in SOURCES)]
    named = re.findall(
        r"(?<![\w/.])(?:configs|quickstart|docs|launch|tools|benchmarks)/[\w/.-]+\.(?:yaml|json|md|py)", text
    )
    missing += [n for n in named if not (ROOT / n).exists() and not (ROOT / "configs" / n).exists()]
    return [name for name in missing if name not in _NOT_OURS]


def has_key(keys: list[str], annotation: object) -> bool:
    """Whether a section, or one that a union holds, has the key that the pieces make."""
    if not isinstance(annotation, type):
        return any(has_key(keys, inner) for inner in typing.get_args(annotation))
    if not issubclass(annotation, Section) or keys[0] not in annotation.model_fields:
        return False
    return not keys[1:] or has_key(keys[1:], annotation.model_fields[keys[0]].annotation)


def unknown_keys(text: str) -> list[str]:
    """Dotted keys of a run's configuration that are named and that it does not have."""
    sections = "|".join(RunConfig.model_fields)
    pattern = rf"(?<![\w./-])((?:{sections})(?:\.[a-z_0-9]+)+)(?![\w(/])"
    text = re.sub(r"^```python$.*?^```", "", text, flags=re.S | re.M)  # where model is a variable
    named = {key for code in code_of(text) for key in re.findall(pattern, code)}
    return sorted(key for key in named - _NOT_KEYS if not has_key(key.split("."), RunConfig))


def command(script: str) -> str:
    """Where a script's command stands."""
    folder, _, name = script.partition("/")
    return f"megadit/cli/{name}" if folder in ("launch", "tools") else script


def sources_of_options(script: str) -> Iterator[str]:
    """A command's own module, what all of them share, and for scores those of the metrics."""
    file = command(script)
    shared = "megadit/cli/__init__.py"
    metrics = "megadit/evaluate/metrics/" if script.endswith("evaluate.py") else file
    return (text for path, text in SOURCES.items() if path in (file, shared) or path.startswith(metrics))


def unknown_options(text: str) -> list[str]:
    """Options that are named and that the command they follow, or in a text any command, does not take."""
    missing = []
    for code in code_of(text):
        scripts = list(re.finditer(r"\b(?:launch|tools|benchmarks)/\w+\.py", code))
        for option in re.finditer(r"(?<![\w-])--[a-z][a-z_-]+", code):
            before = [script.group() for script in scripts if script.start() < option.start()]
            commands = before[-1:] or [path for path in SOURCES if path.startswith(PROGRAMS)]
            if option.group() not in _OPTIONS_OF_OTHERS and not any(
                f'"{option.group()}"' in text for path in commands for text in sources_of_options(path)
            ):
                missing.append(f"{option.group()} of {' '.join(before[-1:])}")
    return missing


def unknown_names(text: str) -> list[str]:
    """Dotted names of megadit's modules, and of what is in them, that are not there."""
    missing = []
    for name in {n for code in code_of(text) for n in re.findall(r"(?<![\w./-])megadit(?:\.\w+)+", code)}:
        pieces = name.split(".")
        modules = [Path(*pieces[:count]) for count in range(len(pieces), 0, -1)]
        files = (file for m in modules for file in (f"{m}.py", f"{m}/__init__.py") if file in SOURCES)
        source = SOURCES[file] if (file := next(files, None)) else ""
        depth = len(Path(file.removesuffix("/__init__.py").removesuffix(".py")).parts) if file else 0
        if not all(re.search(rf"\b{piece}\b", source) for piece in pieces[depth:]):
            missing.append(name)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_documents_name_exists(document):
    text = document.read_text()
    assert unknown_files(text) == []
    assert unknown_keys(text) == []
    assert unknown_options(text) == []
    assert unknown_names(text) == []


@pytest.mark.parametrize(
    ("check", "text", "missing"),
    [
        (unknown_files, "see `train/optimiser.py`", ["train/optimiser.py"]),
        (unknown_files, "`mup/rules.py`, `tests/data/test_*.py`, `tree.py`, `configs/deepspeed/auto.json`", []),
        (unknown_files, "```\npython launch/pretrain.py --config configs/dit/s-2.yaml\n```", ["configs/dit/s-2.yaml"]),
        (unknown_keys, "`optim.lr`, `model.role_hps.hidden.mult` and `train.step`", ["train.step"]),
        (unknown_keys, "```\nlaunch/pretrain.py optim.clip.modes=per_group\n```", ["optim.clip.modes"]),
        (unknown_options, "```\ntorchrun --nproc_per_node 2 launch/pretrain.py \\\n --configs F\n```",
         ["--configs of launch/pretrain.py"]),
        (unknown_options, "`--guidance` and `tools/doctor.py --guidance 2`", ["--guidance of tools/doctor.py"]),
        (unknown_names, "`megadit.transfer.verdict.judge`, `megadit.search.judge`", ["megadit.search.judge"]),
    ],
)  # fmt: skip
def test_each_check_of_names_can_fail(check, text, missing):
    assert check(text) == missing
