"""Conditioning: batches of conditions are sliced, repeated, moved and joined field by field."""

from __future__ import annotations

import pytest
import torch

from megadit.conditioning import Conditioning


def batch() -> Conditioning:
    return Conditioning(
        labels=torch.tensor([3, 1, 2]),
        text=torch.arange(24.0).reshape(3, 4, 2),
        text_mask=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool),
        pooled=torch.arange(6.0).reshape(3, 2),
    )


@pytest.mark.parametrize("index", [slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])])
def test_indexing_takes_the_same_samples_of_every_field(index):
    part = batch()[index]
    assert part.batch_size == 2
    assert part.labels.tolist() == [1, 2]
    assert torch.equal(part.text, batch().text[1:])
    assert torch.equal(part.text_mask, batch().text_mask[1:])
    assert torch.equal(part.pooled, batch().pooled[1:])


def test_a_single_number_would_lose_the_batch_dimension():
    with pytest.raises(TypeError, match="slice"):
        batch()[0]


def test_repeat_and_cat_agree():
    twice, joined = batch().repeat(2), Conditioning.cat([batch(), batch()])
    for name in ("labels", "text", "text_mask", "pooled"):
        assert torch.equal(getattr(twice, name), getattr(joined, name))
    assert twice.batch_size == 6


def test_missing_fields_stay_missing():
    labels_only = Conditioning(labels=torch.tensor([1, 2]))
    for changed in (labels_only[:1], labels_only.repeat(2), labels_only.to("cpu"), Conditioning.cat([labels_only])):
        assert changed.text is None and changed.text_mask is None and changed.pooled is None
    assert Conditioning().batch_size is None
    assert Conditioning.cat([Conditioning(), Conditioning()]).batch_size is None


def test_joining_batches_with_different_fields_is_refused():
    with pytest.raises(ValueError, match="pooled"):
        Conditioning.cat([batch(), Conditioning(labels=batch().labels, text=batch().text, text_mask=batch().text_mask)])
