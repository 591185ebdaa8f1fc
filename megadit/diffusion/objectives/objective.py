"""``Objective``: noising and loss. A training step is ``prepare``, the model's forward pass, ``loss``.

Noise, its mixture with the samples and the target are one operation of ``megadit_kernels``, the squared error another.

Random numbers are keyed by (seed, stream, global sample number), so a sample's noise, timestep and label dropout do not
depend on the batch split, the number of ranks or the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megadit.conditioning import Conditioning
from megadit.rng import batch_uniform, sample_keys
from megadit_kernels import mix_noise
from megadit_kernels.noise.reference import mix

MODEL_TIME = 1000.0  # models see times in [0, 1000], whatever the objective


@dataclass(frozen=True)
class NoisyBatch:
    """A noised batch: the model's inputs, and the targets of the loss.

    x: noisy input, float32 (B, C, H, W).  t: model time, float32 (B,) in [0, 1000].  cond: after label dropout.
    x0: the clean samples, float32 (B, C, H, W).  target: what the model should say: noise, v or velocity, as x0.
    time01: position on the noise schedule, float32 (B,) in [0, 1], 1 is pure noise (for the loss by time bin).
    steps: index into the discrete schedule, int64 (B,); None for flow matching.
    """

    x: Tensor
    t: Tensor
    cond: Conditioning
    x0: Tensor
    target: Tensor
    time01: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevel:
    """How much noise is mixed into each sample: x = signal x0 + sigma noise. t, time01, steps: as of ``NoisyBatch``."""

    signal: Tensor
    sigma: Tensor
    t: Tensor
    time01: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """``total``: loss per sample, float32 (B,), which training averages. ``terms``: its terms by name, each (B,).

    The terms add up to the total, except ``repa``, which is unweighted.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(ABC):
    """Base class: draws noise, timesteps and label dropout; subclasses define the mixture and the loss.

    target: what the model predicts: ``noise``, ``v`` or ``velocity``, as ``megadit_kernels.mix_noise`` has them.
    """

    target: str

    def __init__(self, *, null: Conditioning | None, label_dropout: float) -> None:
        """null: conditions, a batch of one, that replace dropped ones; None: no condition is dropped."""
        self.null = null
        self.label_dropout = label_dropout

    def prepare(
        self,
        x0: Tensor,
        cond: Conditioning,
        numbers: Tensor | Iterable[int],
        seed: int,
        *,
        t01: Tensor | None = None,
        noise: Tensor | None = None,
        drop: bool = True,
    ) -> NoisyBatch:
        """Mix noise into clean samples.

        x0: (B, C, H, W), any float dtype.  numbers: the B global sample numbers.  For the validation loss, t01: fixed
        positions on the noise schedule, (B,) in [0, 1], instead of random ones; noise: fixed noise, (B, C, H, W); drop:
        False keeps every condition.
        """
        ids = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        if len(ids) != x0.shape[0]:
            raise ValueError(f"numbers: {len(ids)} sample numbers for a batch of {x0.shape[0]}")
        x0 = x0.float()
        if t01 is None:
            # One number per sample: on the CPU, where the keys are, instead of by a sequence of tiny kernels.
            t01 = self.draw_times(sample_keys(seed, "timestep", ids))
        if drop:
            cond = self._drop(cond, ids, seed)
        level = self.level(t01.to(x0.device, torch.float32))
        if noise is None:
            keys = sample_keys(seed, "noise", ids).to(x0.device)
            x, target = mix_noise(x0, keys, level.signal, level.sigma, self.target)
        else:
            x, target = mix(x0, noise.to(x0), level.signal, level.sigma, self.target)
        return NoisyBatch(x, level.t, cond, x0, target, level.time01, level.steps)

    def _drop(self, cond: Conditioning, ids: list[int], seed: int) -> Conditioning:
        """Conditions replaced by the null ones with the configured probability (DiT's token_drop)."""
        if cond.batch_size is None or self.null is None or self.label_dropout == 0.0:
            return cond
        drop = batch_uniform(sample_keys(seed, "label-dropout", ids)) < self.label_dropout
        return cond.dropped(drop, self.null)

    @abstractmethod
    def draw_times(self, keys: Tensor) -> Tensor:
        """One position on the noise schedule per key: (B,) int64 -> float32 (B,) in [0, 1]."""

    @abstractmethod
    def level(self, t01: Tensor) -> NoiseLevel:
        """The noise at positions t01, float32 (B,), on their device."""

    @abstractmethod
    def loss(self, output: Tensor, noisy: NoisyBatch) -> LossTerms:
        """Loss of the model's output, (B, C or 2C, H, W) in any float dtype, computed in float32."""


def check_channels(output: Tensor, noisy: NoisyBatch, factor: int) -> None:
    """Raise ValueError unless the output has the input's shape with ``factor`` times its channels."""
    batch, channels, *sides = noisy.x.shape
    if tuple(output.shape) != (batch, channels * factor, *sides):
        expected = (batch, channels * factor, *sides)
        raise ValueError(f"model output has shape {tuple(output.shape)}, this objective needs {expected}")
