"""``data.classes`` keeps some classes, relabels them in the given order, and refuses names that are not there."""

import pytest
import torch

from megadit.config import DataConfig
from megadit.data import build_datasets, describe
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
