"""What every objective shares: draws keyed by sample number, label dropout, fixed times and noise."""

from __future__ import annotations

import pytest
import torch

from megadit.conditioning import Conditioning
from megadit.config.schema.run import ObjectiveConfig
from megadit.diffusion import build_objective
from megadit.rng import batch_normal, normal, sample_keys

SHAPE = (2, 4, 4)


def objective(kind: str = "ddpm", dropout: float = 0.5):
    return build_objective(ObjectiveConfig(kind=kind, label_dropout=dropout), learn_sigma=False, num_classes=10)


def prepare(target, numbers, seed: int = 3, **fixed):
    """Sample n always has the same image and label n % 10."""
    x0 = torch.stack([normal(n, SHAPE) for n in numbers])
    cond = Conditioning(labels=torch.tensor([n % 10 for n in numbers]))
    return target.prepare(x0, cond, torch.tensor(list(numbers)), seed, **fixed)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_a_sample_meets_the_same_draws_in_every_batch_split(kind):
    target = objective(kind)
    batch = prepare(target, range(100, 116))
    for sizes in ([4, 4, 4, 4], [1, 15], [7, 9]):
        start, parts = 100, []
        for size in sizes:
            parts.append(prepare(target, range(start, start + size)))
            start += size
        for name in ("x", "t", "x0", "target", "time01"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert torch.equal(torch.cat([part.cond.labels for part in parts]), batch.cond.labels)
    backwards = prepare(target, range(115, 99, -1))
    assert torch.equal(backwards.x.flip(0), batch.x)


def test_seeds_and_sample_numbers_give_other_draws():
    target = objective()
    first, other_seed, other_number = prepare(target, [5]), prepare(target, [5], seed=4), prepare(target, [6])
    assert not torch.allclose(first.target, other_seed.target)
    assert not torch.allclose(first.target, other_number.target)
    assert len({noisy.t.item() for noisy in (first, other_seed, other_number)}) == 3


def test_noise_is_standard_normal_and_times_cover_the_schedule():
    noisy = prepare(objective(), range(2000))
    assert noisy.target.mean().abs() < 0.02
    assert noisy.target.std().item() == pytest.approx(1.0, abs=0.02)
    counts = torch.histc(noisy.t, bins=10, min=0, max=1000)
    assert (counts - 200).abs().max() < 5 * 200**0.5
    assert noisy.steps.min() >= 0 and noisy.steps.max() <= 999


def test_label_dropout_replaces_by_the_null_label_at_its_rate():
    labels = torch.tensor([n % 10 for n in range(4000)])
    dropped = prepare(objective(dropout=0.1), range(4000)).cond.labels
    changed = dropped != labels
    assert (dropped[changed] == 10).all()
    assert changed.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_label_dropout_can_be_off():
    labels = torch.tensor([n % 10 for n in range(50)])
    assert torch.equal(prepare(objective(dropout=0.0), range(50)).cond.labels, labels)
    assert torch.equal(prepare(objective(dropout=0.9), range(50), drop=False).cond.labels, labels)


def test_a_condition_without_its_null_is_refused_and_none_is_allowed():
    target, x0 = objective(), normal(1, (2, *SHAPE))
    with pytest.raises(ValueError, match="pooled: there is no null condition"):
        target.prepare(x0, Conditioning(labels=torch.tensor([1, 2]), pooled=torch.ones(2, 3)), [0, 1], 0)
    assert target.prepare(x0, Conditioning(), [0, 1], 0).cond.labels is None


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_fixed_times_and_noise_are_taken_as_they_are(kind):
    target, times = objective(kind), (torch.arange(8) + 0.5) / 8
    noise = batch_normal(sample_keys(7, "fixed", range(8)), SHAPE)
    first = prepare(target, range(8), seed=0, t01=times, noise=noise)
    second = prepare(target, range(8), seed=1, t01=times, noise=noise)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.target, noise if kind == "ddpm" else noise - first.x0)
    torch.testing.assert_close(first.time01, times, atol=1e-3, rtol=0)


def test_half_precision_images_are_mixed_in_float32():
    target, x0 = objective(), normal(1, (2, *SHAPE)).bfloat16()
    noisy = target.prepare(x0, Conditioning(), [0, 1], 0)
    assert noisy.x.dtype == noisy.x0.dtype == noisy.t.dtype == torch.float32


def test_numbers_must_match_the_batch():
    with pytest.raises(ValueError, match="3 sample numbers for a batch of 2"):
        objective().prepare(torch.zeros(2, *SHAPE), Conditioning(), [0, 1, 2], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_a_gpu_mixes_the_same_noise_as_the_cpu(kind):
    target, x0 = objective(kind), torch.stack([normal(n, SHAPE) for n in range(16)])
    cond = Conditioning(labels=torch.arange(16) % 10)
    here = target.prepare(x0, cond, range(16), 0)
    there = target.prepare(x0.cuda(), cond.to("cuda"), range(16), 0)
    for name in ("x", "t", "target", "time01"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(there.cond.labels.cpu(), here.cond.labels)
    output = normal(99, (16, *SHAPE))
    torch.testing.assert_close(target.loss(output.cuda(), there).total.cpu(), target.loss(output, here).total)
