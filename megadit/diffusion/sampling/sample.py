"""Sampling: the loop over a diffusers scheduler with classifier-free guidance.

The initial noise and the noise of the steps of image i are keyed by (seed, i), so that image i does not depend on batch
or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megadit.conditioning import Conditioning
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import ObjectiveConfig, SampleConfig
from megadit.config.schema.sampling import needs_null
from megadit.diffusion.sampling.schedulers import build_sampler
from megadit.errors import UserError
from megadit.rng import batch_normal, sample_keys, stream_key

Denoiser = Callable[[Tensor, float], Tensor]


def sample(
    model: nn.Module,
    model_config: ModelConfig,
    objective: ObjectiveConfig,
    config: SampleConfig,
    *,
    numbers: Sequence[int],
    cond: Conditioning,
    null_cond: Conditioning | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sample one batch: float32 (B, C, H, W) on ``device``, in the model's (latent) space.

    numbers: the B image numbers, the keys of the noise with ``config.seed``.  cond: conditions of the B images.
    null_cond: null conditions of the B images, needed where ``config.guidance`` is not 1.
    Raises UserError where scheduler, steps or guidance do not fit the model. The model's mode is restored.
    """
    shape = (model_config.in_channels, model_config.input_size, model_config.input_size)
    if cond.batch_size not in (None, len(numbers)):
        raise ValueError(f"cond: {cond.batch_size} conditions for {len(numbers)} pictures")
    sampler = build_sampler(objective, config, learn_sigma=model_config.learn_sigma)
    null = None if null_cond is None else null_cond.to(device)
    denoise = guided(model, model_config, config, cond.to(device), null)
    generators = [step_noise(config.seed, number) for number in numbers]
    with torch.no_grad(), evaluating(model):
        x = batch_normal(sample_keys(config.seed, "sample", numbers).to(device), shape)
        for time, model_time in zip(sampler.times, sampler.model_times, strict=True):
            output = denoise(x, model_time)
            if not sampler.uses_variance:
                output = output[:, : shape[0]]
            x = sampler.scheduler.step(output, time, x, generator=generators, return_dict=False)[0]
    return x


def guided(
    model: nn.Module,
    model_config: ModelConfig,
    config: SampleConfig,
    cond: Conditioning,
    null_cond: Conditioning | None,
) -> Denoiser:
    """The model as a function of (x, model time) -> float32 (B, C or 2C, H, W), with classifier-free guidance.

    uncond + scale * (cond - uncond) on the first ``guidance_channels`` channels (default: all of the prediction; the
    DiT code guides 3 of 4); other channels, and the variance, are the conditional ones. One forward pass of 2B samples,
    the conditional half first (Ho & Salimans 2022).
    """
    if config.guidance == 1.0:
        return lambda x, time: _call(model, x, time, cond)
    if null_cond is None:
        raise UserError(needs_null(config.guidance))
    guided_channels = config.guidance_channels or model_config.in_channels
    if guided_channels > model_config.in_channels:
        raise UserError(
            f"sample.guidance_channels: {guided_channels} is more than the model's {model_config.in_channels} "
            "channels; leave it out to guide them all"
        )
    both = Conditioning.cat([cond, null_cond])

    def denoise(x: Tensor, time: float) -> Tensor:
        conditional, unconditional = _call(model, torch.cat([x, x]), time, both).chunk(2)
        start, end = unconditional[:, :guided_channels], conditional[:, :guided_channels]
        return torch.cat([start + config.guidance * (end - start), conditional[:, guided_channels:]], dim=1)

    return denoise


def _call(model: nn.Module, x: Tensor, time: float, cond: Conditioning) -> Tensor:
    t = torch.full((x.shape[0],), time, dtype=torch.float32, device=x.device)
    return model(x, t, cond).float()


def step_noise(seed: int, number: int) -> torch.Generator:
    """The generator of the noise of image ``number``'s steps; on the CPU, so that it is the same for every device."""
    return torch.Generator().manual_seed(stream_key(seed, "sample-step", number))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` in evaluation mode, and restores its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
