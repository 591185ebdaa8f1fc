"""Documents stay true: links lead somewhere, line anchors point at the code they speak of, commands exist."""

import re

import pytest

from helpers.ranks import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")

# What the lines that README's table links to must contain.
ANCHORED = [
    ('if role == "hidden":', "math.sqrt(base_fan_in / fan_in)"),
    ("lr_mult=hps.lr / ratio if",),
    ('return spec.fan_in_mult if mode == "independent"',),
    ("lr_mult=hps.lr / ratio if",),
    ("rule.std(base_fan_in, base_fan_out)",),
    ("self.output_mult) / ratio",),
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
    ("constant in width", "std = rule.std(base_fan_in, base_fan_out)"),
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
    ("`original`", "_ORIGINALS: "),
    ("`fan_in`", "_FAN_IN_SCHEME: "),
]


def test_line_anchors_of_the_mup_table_point_at_their_rules():
    code = (ROOT / "megadit/mup/rules.py").read_text().splitlines()
    anchors = re.findall(r"\[([^]]+)\]\(\.\./megadit/mup/rules\.py#L(\d+)\)", (ROOT / "docs/mup.md").read_text())
    shown = [(words, code[int(line) - 1].strip()) for words, line in anchors]
    assert [words for words, _ in shown] == [words for words, _ in RULES]
    for (words, line), (_, expected) in zip(shown, RULES, strict=True):
        assert line.startswith(expected), f"{words} leads to {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_files_that_exist(document):
    for path in re.findall(
        r"(?<![\w/.])((?:launch|tools|benchmarks|configs)/[\w/.-]+\.(?:py|yaml|json))", document.read_text()
    ):
        assert (ROOT / path).exists(), path
