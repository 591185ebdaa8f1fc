"""What a configuration asks a family's spec: a family that megadit does not have is known by its spec alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megadit.config import load_config, save_config
from megadit.config.family import FamilySpec
from megadit.config.presets import preset, preset_names, sp_and_mup
from megadit.config.schema.json_schema import file_schema
from megadit.errors import UserError
from megadit.extensions import FAMILIES

TOY = FamilySpec(
    name="toy",
    model="nowhere:Toy",
    init={"original": "nowhere:ORIGINAL"},
    presets=sp_and_mup("toy-s", {"width": 64, "depth": 2, "options": {"gain": 3.0}}, 4, 32),
    options={"gain": 1.0, "steps": 2, "mode": "plain", "deep": False},
    blocks=lambda config: 2 * config.depth,
)
FILE = "model: {family: toy, heads: 2, width: 32, depth: 1, options: {steps: 5}}\ntrain: {steps: 2}\n"


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    FAMILIES.add("toy", TOY)
    yield
    FAMILIES.discard("toy")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(FILE, encoding="utf-8")
    return tmp_path / "c.yaml"


def test_options_are_taken_key_by_key_and_the_others_are_at_their_defaults(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["model.options.gain=2", "model.options.deep=true"])
    assert config.model.options == {"gain": 2.0, "steps": 5, "mode": "plain", "deep": True}
    assert type(config.model.options["gain"]) is float and config.model.blocks == 2
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.options.gian=2",
            "model.options.gian: 2 is no option of family toy; did you mean gain? (in an override",
        ),
        ("model.options.steps=2.5", "model.options.steps: 2.5 is not of the type of its default, 2; change it"),
        ("model.options.mode=true", "model.options.mode: True is not of the type of its default, 'plain'"),
        ("parallel.tensor=2", "parallel.tensor: 2 works for dit, pixart, uvit, mmdit, and model.family is toy"),
        ("model.conv=false", "model.conv: False belongs to family uvit"),
        ("model.init=authors", "model.init: authors is the start of the paper's PixArt-muP, not of toy"),
        ("model.text={dim: 8}", "model.text: belongs to families pixart, uvit and mmdit"),
        (
            "model.family=toi",
            "model.family: 'toi' is not one of 'dit', 'pixart', 'uvit', 'mmdit', 'toy'; a plugin's needs",
        ),
    ],
)
def test_what_the_spec_does_not_say_is_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(file, [override])
    assert str(raised.value).startswith(message)


def test_a_family_without_options_refuses_them_and_another_family_drops_them(file: Path) -> None:
    assert load_config(file, ["model.family=dit"]).model.options == {}
    with pytest.raises(UserError, match=r"^model\.options\.gain: 2 is no option of family dit; it has none, leave it"):
        load_config(file, ["model.family=dit", "model.options.gain=2"])


def test_its_presets_are_among_all_others_and_decide_its_options(file: Path) -> None:
    assert preset_names()[-2:] == ("toy-s", "toy-s-mup") and preset("toy-s-mup").head_dim == 16
    model = load_config(file, ["model.preset=toy-s", "model.options.mode=fine"]).model
    assert model.options == {"gain": 3.0, "steps": 2, "mode": "fine", "deep": False}
    assert "toy" in file_schema()["$defs"]["ModelConfig"]["properties"]["family"]["enum"]
