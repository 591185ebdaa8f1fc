"""``data.classes`` keeps some classes, relabels them in the given order, and refuses names that are not there."""

import pytest
import torch
from PIL import Image

from megadit.config import DataConfig
from megadit.data import build_datasets, describe
from megadit.data.build import split
from megadit.data.dataset import ArraySet
from megadit.errors import UserError


def test_kept_classes_are_relabelled_in_their_order():
    everything, held = build_datasets(DataConfig(name="digits"))
    chosen, held_chosen = build_datasets(DataConfig(name="digits", classes=("7", "2")))
    assert chosen.classes == ("7", "2")
    assert describe(chosen).num_classes == 2
    sevens = [i for i in range(len(everything)) if everything.label(i) == 7]
    ours = [i for i in range(len(chosen)) if chosen.label(i) == 0]
    assert len(sevens) == len(ours) > 100
    for a, b in zip(sevens, ours, strict=True):
        assert torch.equal(everything.image(a), chosen.image(b))
    assert {chosen.label(i) for i in range(len(chosen))} == {0, 1}
    assert len(held_chosen) == sum(held.label(i) in (2, 7) for i in range(len(held)))


def test_a_name_that_is_no_class_suggests_the_nearest():
    with pytest.raises(UserError, match=r"data\.classes: 'Flag' is not a class of emoji; did you mean 'Flags'"):
        build_datasets(DataConfig(classes=("Flag",)))


@pytest.fixture
def folders(tmp_path):
    def made(*names: str) -> DataConfig:
        for name in names:
            (tmp_path / name).mkdir()
            for number in range(2):
                Image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
        return DataConfig(name="image-folder", path=str(tmp_path), image_size=4, val_fraction=0.0)

    return made


def test_names_are_taken_letter_for_letter(folders):
    config = folders("cat", "Cat", "maillot, tank suit", "cafe\u0301")
    chosen, _ = build_datasets(config.model_copy(update={"classes": ("Cat", "maillot, tank suit", "caf\u00e9")}))
    assert chosen.classes == ("Cat", "maillot, tank suit", "cafe\u0301")
    assert [chosen.label(i) for i in range(len(chosen))] == [0, 0, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("DOG",), r"'DOG' is not a class of image-folder; did you mean 'dog'\?"),
        (("ant,dog",), r"'ant,dog' is not a class of image-folder; write a list, data\.classes=\[ant, dog\]"),
        (("dog", "dog"), "'dog' stands there twice, and is one class of image-folder; keep one"),
        (("dog", " dog"), "' dog' stands there twice"),
        (("dgo",), r"'dgo' is not .*; did you mean 'dog'\?"),
    ],
)
def test_choices_that_are_refused(folders, classes, sentence):
    with pytest.raises(UserError, match=f"^data.classes: {sentence}"):
        build_datasets(folders("ant", "dog", "zebra").model_copy(update={"classes": classes}))


def test_two_classes_of_one_name_cannot_be_chosen():
    images = ArraySet(
        "x", ("a", "b", "a"), 2, "", torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), ("",) * 3, ("",) * 3
    )
    assert split(images, ("0", "1", "2"), 0.0, labelled=True, classes=["b"])[0].classes == ("b",)
    with pytest.raises(UserError, match=r"'a' names 2 classes of x, a \(label 0\) and a \(label 2\)"):
        split(images, ("0", "1", "2"), 0.0, labelled=True, classes=["a"])
