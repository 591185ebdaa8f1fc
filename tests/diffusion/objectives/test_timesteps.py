"""Distributions of times, the resolution shift, discretisation, and the min-SNR weight."""

from __future__ import annotations

import math

import pytest
import torch

from megadit.diffusion.objectives.ddpm import discrete_steps, min_snr_weight
from megadit.diffusion.objectives.flow import logit_normal_times, shift_times
from megadit.rng import batch_uniform, sample_keys

KEYS = sample_keys(0, "timestep", range(20000))
KOLMOGOROV = 1.95 / math.sqrt(20000)  # the statistic exceeds this once in a thousand draws


def distance(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance, given the distribution function at the sorted values."""
    count = values.numel()
    above = (torch.arange(1, count + 1) / count - cdf).max()
    below = (cdf - torch.arange(count) / count).max()
    return max(above.item(), below.item())


def test_uniform_times_are_uniform():
    times = batch_uniform(KEYS).double().sort().values
    assert times[0] > 0 and times[-1] <= 1
    assert distance(times, times) < KOLMOGOROV


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.5), (1.0, 2.0)])
def test_logit_normal_times_have_the_right_distribution(mean, std):
    times = logit_normal_times(KEYS, mean, std).double().sort().values
    z = (torch.log(times / (1 - times)) - mean) / std
    assert distance(times, 0.5 * (1 + torch.erf(z / math.sqrt(2)))) < KOLMOGOROV


def test_shift_one_changes_nothing_and_shifts_compose():
    times = torch.linspace(0, 1, 11)
    assert torch.equal(shift_times(times, 1.0), times)
    torch.testing.assert_close(shift_times(shift_times(times, 2.0), 3.0), shift_times(times, 6.0))


def test_shift_keeps_the_ends_and_moves_towards_noise():
    times = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert shift_times(times, 3.0).tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0])


def test_shift_adds_log_shift_to_the_logit():
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(torch.logit(shift_times(times, 3.0)), torch.logit(times) + math.log(3.0))


def test_discrete_steps_are_equal_bins():
    assert discrete_steps(torch.tensor([0.0, 0.0999, 0.1, 0.95, 1.0]), 10).tolist() == [0, 0, 1, 9, 9]
    assert discrete_steps((torch.arange(1000) + 0.5) / 1000, 1000).tolist() == list(range(1000))


def test_min_snr_weights_have_their_closed_form():
    snr = torch.tensor([0.01, 1.0, 5.0, 50.0])
    assert min_snr_weight(snr, 5.0, "eps").tolist() == pytest.approx([1.0, 1.0, 1.0, 0.1])
    assert min_snr_weight(snr, 5.0, "v").tolist() == pytest.approx([0.01 / 1.01, 0.5, 5 / 6, 5 / 51])
