"""Batches: scaling, labels, captions, and the keyed mirror."""

from __future__ import annotations

import numpy as np
import torch

from megadit.data.batch import Batch, make_batch, scale_images
from megadit.data.dataset import ArraySet, Subset, describe
from megadit.data.order import SampleOrder


def small_set(size: int = 12) -> ArraySet:
    """Pictures that differ from each other and from their mirror images."""
    pixels = torch.arange(size * 3 * 4 * 4).reshape(size, 3, 4, 4).remainder(251).to(torch.uint8)
    return ArraySet(
        name="small",
        classes=("a", "b", "c"),
        image_size=4,
        notice="public",
        images=pixels,
        labels=torch.arange(size) % 3,
        captions=tuple(f"picture {i}" for i in range(size)),
        bases=tuple(str(i) for i in range(size)),
    )


def batch_of(numbers: range | list[int], *, seed: int = 0, flip: bool = False) -> Batch:
    data = small_set()
    return make_batch(data, SampleOrder(len(data), seed), list(numbers), seed=seed, flip=flip)


def test_a_batch_holds_the_images_that_the_order_names() -> None:
    data, batch = small_set(), batch_of(range(10, 15))
    indices = SampleOrder(12, 0).indices(range(10, 15))
    expected = np.stack([data.images[i].numpy().astype(np.float32) / np.float32(127.5) - 1 for i in indices])
    assert batch.images.dtype == torch.float32 and batch.images.shape == (5, 3, 4, 4)
    np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-7)
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [i % 3 for i in indices]
    assert batch.captions == [f"picture {i}" for i in indices]
    assert batch.numbers.tolist() == list(range(10, 15)) and len(batch) == 5


def test_scaling_reaches_both_ends_and_leaves_its_input_alone() -> None:
    pixels = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert scale_images(pixels).tolist() == [[-1.0, 1.0]]
    assert pixels.tolist() == [[0, 255]]


def test_the_mirror_is_keyed_by_the_sample_number() -> None:
    plain, mirrored = batch_of(range(600)), batch_of(range(600), flip=True)
    same = (mirrored.images == plain.images).flatten(1).all(1)
    turned = (mirrored.images == plain.images.flip(-1)).flatten(1).all(1)
    assert bool((same ^ turned).all())
    assert 0.42 < turned.float().mean() < 0.58  # 600 fair draws: within 4 standard deviations
    # An image meets both sides over the epochs, and a batch made alone agrees with one made within others.
    image_0 = [bool(turned[s]) for s, i in enumerate(SampleOrder(12, 0).indices(range(600))) if i == 0]
    assert len(set(image_0)) == 2
    alone = batch_of([431, 17], flip=True)
    assert torch.equal(alone.images, mirrored.images[[431, 17]])


def test_the_mirror_depends_on_the_seed() -> None:
    data, order = small_set(), SampleOrder(12, 0)
    one = make_batch(data, order, range(64), seed=0, flip=True)
    two = make_batch(data, order, range(64), seed=1, flip=True)
    assert not torch.equal(one.images, two.images)


def test_a_subset_shows_its_part_and_can_hide_labels() -> None:
    part = Subset(small_set(), (5, 2))
    assert (len(part), part.label(0), part.caption(1), part.channels, part.image_size) == (2, 2, "picture 2", 3, 4)
    assert torch.equal(part.image(1), small_set().images[2])
    facts = describe(part)
    assert (facts.name, facts.num_classes, facts.size, facts.notice) == ("small", 3, 2, "public")
    bare = Subset(small_set(), (5, 2), labelled=False)
    assert bare.classes == () and bare.label(0) == 0 and describe(bare).num_classes == 0
