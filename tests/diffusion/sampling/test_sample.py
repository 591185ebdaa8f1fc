"""Guidance, keyed noise and batch-size independence of the sampling loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig, SampleConfig
from megadit.diffusion.sampling.sample import guided, sample, step_noise
from megadit.errors import UserError
from megadit.rng import normal, stream_key

CLASSES = 5


def config(learn_sigma: bool = True) -> ModelConfig:
    return ModelConfig(
        width=16, heads=1, depth=1, in_channels=4, input_size=4, learn_sigma=learn_sigma, num_classes=CLASSES
    )


class LabelNet(nn.Module):
    """Depends on every input: pixels, time and label; remembers the batches it was called with."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, channels, 3, padding=1)
        self.table = nn.Embedding(CLASSES + 1, channels)
        for name, parameter in self.named_parameters():
            parameter.data = 0.2 * normal(stream_key(0, name), parameter.shape)
        self.calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.labels is not None and t.dtype == torch.float32 and t.shape == x.shape[:1]
        self.calls.append((x, t, cond.labels, self.training))
        return torch.tanh(self.mix(x) + self.table(cond.labels)[:, :, None, None] + t.view(-1, 1, 1, 1) / 1000)


def conditions(labels: list[int]) -> tuple[Conditioning, Conditioning]:
    values = torch.tensor(labels)
    return Conditioning(labels=values), Conditioning(labels=torch.full_like(values, CLASSES))


def draw(
    net: nn.Module,
    numbers: list[int],
    scheduler: str,
    guidance: float = 3.0,
    seed: int = 0,
    kind: str = "ddpm",
    device: str = "cpu",
) -> Tensor:
    cond, null = conditions([number % CLASSES for number in numbers])
    settings = SampleConfig(scheduler=scheduler, steps=4, guidance=guidance, seed=seed)
    model, objective = config(kind == "ddpm"), ObjectiveConfig(kind=kind)
    return sample(net, model, objective, settings, numbers=numbers, cond=cond, null_cond=null, device=device)


SAMPLERS = [("ddpm", "ddpm"), ("ddim", "ddpm"), ("dpm", "ddpm"), ("euler", "flow")]


@pytest.mark.parametrize(("scheduler", "kind"), SAMPLERS)
def test_a_picture_is_the_same_whatever_batch_it_is_in(scheduler, kind):
    net = LabelNet(8 if kind == "ddpm" else 4)
    together = draw(net, [0, 1, 2, 3, 4], scheduler, kind=kind)
    apart = torch.cat([draw(net, part, scheduler, kind=kind) for part in ([0], [1, 2], [3, 4])])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=2e-5)
    reordered = draw(net, [3, 0], scheduler, kind=kind)
    torch.testing.assert_close(reordered, together[[3, 0]], atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("scheduler", "kind"), SAMPLERS)
def test_a_gpu_draws_the_pictures_of_the_cpu(scheduler, kind):
    net = LabelNet(8 if kind == "ddpm" else 4)
    here = draw(net, [0, 1, 2], scheduler, kind=kind)
    there = draw(net.cuda(), [0, 1, 2], scheduler, kind=kind, device="cuda")
    torch.testing.assert_close(there.cpu(), here, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("scheduler", "kind"), SAMPLERS)
def test_the_same_call_gives_the_same_bits_and_another_seed_does_not(scheduler, kind):
    net = LabelNet(8 if kind == "ddpm" else 4)
    first, again = draw(net, [0, 1], scheduler, kind=kind), draw(net, [0, 1], scheduler, kind=kind)
    assert torch.equal(first, again)
    assert not torch.allclose(first, draw(net, [0, 1], scheduler, seed=1, kind=kind), atol=1e-2)
    assert not torch.allclose(first[:1], draw(net, [5], scheduler, kind=kind), atol=1e-2)  # the label of picture 0


def test_step_noise_differs_between_pictures_and_between_steps():
    first, second = step_noise(0, 0), step_noise(0, 1)
    draws = [torch.randn(1000, generator=source) for source in (first, first, second)]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.15
    assert torch.equal(draws[0], torch.randn(1000, generator=step_noise(0, 0)))


@pytest.mark.parametrize(("channels", "expected"), [(None, 4), (3, 3), (1, 1)])
def test_guidance_touches_the_first_channels_only(channels, expected):
    net, (cond, null) = LabelNet(), conditions([1, 4])
    settings = SampleConfig(guidance=4.0, guidance_channels=channels)
    x = torch.linspace(-1, 1, 128).reshape(2, 4, 4, 4)
    with torch.no_grad():
        output = guided(net, config(), settings, cond, null)(x, 123.0)
        time = torch.full((2,), 123.0)
        on, off = net(x, time, cond), net(x, time, null)
    by_hand = on.clone()
    by_hand[:, :expected] = off[:, :expected] + 4.0 * (on[:, :expected] - off[:, :expected])
    torch.testing.assert_close(output, by_hand)
    assert not torch.allclose(output[:, :expected], on[:, :expected])


def test_guidance_is_one_pass_with_the_conditional_half_first():
    net = LabelNet()
    draw(net, [0, 1], "ddim")
    assert len(net.calls) == 4  # one pass per step
    x, times, labels, _ = net.calls[0]
    assert labels.tolist() == [0, 1, CLASSES, CLASSES]
    assert torch.equal(x[:2], x[2:])
    assert times.tolist() == [999.0] * 4
    assert [call[1][0].item() for call in net.calls] == [999.0, 666.0, 333.0, 0.0]


def test_guidance_one_leaves_the_null_label_out():
    net = LabelNet()
    draw(net, [0, 1], "ddim", guidance=1.0)
    assert net.calls[0][2].tolist() == [0, 1]


def test_guidance_zero_is_unconditional():
    net = LabelNet()
    cond, null = conditions([0, 1])
    x = torch.ones(2, 4, 4, 4)
    with torch.no_grad():
        output = guided(net, config(), SampleConfig(guidance=0.0), cond, null)(x, 5.0)
        torch.testing.assert_close(output[:, :4], net(x, torch.full((2,), 5.0), null)[:, :4])


def test_the_model_samples_in_evaluation_mode_and_keeps_its_own():
    net = LabelNet().train()
    draw(net, [0], "ddim")
    assert not any(call[3] for call in net.calls)
    assert net.training


def test_guidance_without_null_conditions_is_refused():
    with pytest.raises(UserError, match=r"sample\.guidance: 2"):
        sample(
            LabelNet(), config(), ObjectiveConfig(), SampleConfig(guidance=2.0), numbers=[0], cond=conditions([0])[0]
        )


def test_more_guidance_channels_than_channels_are_refused():
    cond, null = conditions([0])
    with pytest.raises(UserError, match=r"sample\.guidance_channels: 5.*4"):
        guided(LabelNet(), config(), SampleConfig(guidance=2.0, guidance_channels=5), cond, null)


def test_conditions_must_match_the_pictures():
    with pytest.raises(ValueError, match="2 conditions for 1"):
        sample(LabelNet(), config(), ObjectiveConfig(), SampleConfig(), numbers=[0], cond=conditions([0, 1])[0])
