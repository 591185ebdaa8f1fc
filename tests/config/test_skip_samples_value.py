"""Forms of ``train.skip_samples``: what is taken, and the sentence for what is not."""

import pytest

from megadit.config import load
from megadit.errors import UserError

CONFIG = "configs/quickstart/digits.yaml"


def loaded(value):
    return load(CONFIG, [f"train.skip_samples={value}"]).config.train.skip_samples


@pytest.mark.parametrize(
    ("value", "windows"),
    [
        ("[]", ()),
        ("[[9216,9472]]", ((9216, 9472),)),
        ("[[9216, 9472], [0, 1]]", ((9216, 9472), (0, 1))),
        ("[[0, 4], [4, 8]]", ((0, 4), (4, 8))),
    ],
)
def test_taken(value, windows):
    assert loaded(value) == windows


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[[5, 5]]", "train.skip_samples: [5, 5] is no window"),
        ("[[9, 5]]", "[9, 5] is no window"),
        ("[[-1, 5]]", "[-1, 5] is no window"),
        ("[[0, 9], [4, 12]]", "[0, 9] and [4, 12] overlap; write [0, 12]"),
        ("[[0, 9], [0, 9]]", "[0, 9] and [0, 9] overlap"),
        ("[9216, 9472]", "train.skip_samples: [9216, 9472] is one window and not a list of them; write [[9216, 9472]]"),
        ("[[9216]]", "train.skip_samples"),
        ("[[9216, 9472, 9500]]", "train.skip_samples"),
        ("[[0.5, 3]]", "train.skip_samples"),
        ("[[true, 3]]", "train.skip_samples"),
        ("9216", "train.skip_samples"),
        ("null", "train.skip_samples"),
    ],
)
def test_refused(value, said):
    with pytest.raises(UserError) as refused:
        loaded(value)
    assert said in str(refused.value) and "\n" not in str(refused.value)
