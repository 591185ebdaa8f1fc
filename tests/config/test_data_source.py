"""A data source that a plugin registers is chosen, asked what it reads, and loaded as those of megadit are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megadit.config import DataConfig, load_config
from megadit.config.data_source import DataSource
from megadit.data import build_datasets
from megadit.errors import UserError
from megadit.extensions import DATA_SOURCES

DIGITS = "quickstart/digits.yaml"


def load_stripes(config: DataConfig, num_classes: int | None) -> object:
    import torch

    from megadit.data.dataset import ArraySet

    size, count = config.image_size or 8, int(config.options["count"])
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[::2, :, ::2] = 255
    return ArraySet(
        name="stripes",
        classes=("rows", "none"),
        image_size=size,
        notice="",
        images=images,
        labels=torch.arange(count) % 2,
        captions=("",) * count,
        bases=tuple(map(str, range(count))),
    )


def refuse_odd(config: DataConfig) -> None:
    if config.options["count"] % 2:
        raise UserError("data.options.count: is odd; give an even number")


@pytest.fixture(autouse=True)
def stripes() -> Iterator[None]:
    DATA_SOURCES.add("stripes", DataSource(load_stripes, refuse_odd, options={"count": 40, "bold": False}))
    yield
    DATA_SOURCES.discard("stripes")


def test_it_is_chosen_and_loaded_with_its_options() -> None:
    config = load_config(DIGITS, ["data.name=stripes", "data.options.count=64", "data.val_fraction=0.5"]).data
    assert config.options == {"count": 64, "bold": False}
    train, held_out = build_datasets(config)
    assert len(train) + len(held_out) == 64 and 0 < len(held_out) < 64
    assert train.classes == ("rows", "none") and train.image(0).shape == (1, 8, 8)


def test_its_check_comes_before_torch_is_imported() -> None:
    config = load_config(DIGITS, ["data.name=stripes", "data.options.count=3"]).data
    with pytest.raises(UserError, match=r"data\.options\.count: is odd"):
        DATA_SOURCES.get(config.name).check(config)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (
            ["data.options.cuont=3"],
            r"data\.options\.cuont: 3 is no option of .* stripes; did you mean count\?",
        ),
        (["data.options.count=many"], r"data\.options\.count: 'many' is not of the type of its default, 40"),
        (["data.path=/x"], r"data\.path: '/x' is not read where data\.name is stripes"),
        (["data.crop=center"], r"data\.crop: 'center' is not read where data\.name is stripes"),
    ],
)
def test_what_it_does_not_read_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_config(DIGITS, ["data.name=stripes", *overrides])


def test_options_of_one_source_mean_nothing_to_another() -> None:
    with pytest.raises(UserError, match=r"data\.options\.count: 2 is no option of data source digits; it has none"):
        load_config(DIGITS, ["data.options.count=2"])
    assert DataConfig(name="digits").options == {}


def test_configurations_with_options_are_keys_of_a_cache() -> None:
    one, other = (DataConfig(name="stripes", options={"count": count}) for count in (2, 4))
    assert len({one: 1, other: 2, one.model_copy(): 3}) == 2


def test_a_taken_name_and_an_unknown_one_are_refused() -> None:
    with pytest.raises(UserError, match="data source 'digits': there is one of that name already"):
        DATA_SOURCES.add("digits", DataSource(load_stripes))
    with pytest.raises(UserError, match=r"data\.name: 'strips' is not one of .*'stripes'; a plugin's needs --plugins"):
        load_config(DIGITS, ["data.name=strips", "data.path=/x"])
