"""Exponential moving averages (EMA) of the weights, on each rank's shard of the float32 masters.

Every average has one buffer for every buffer that the optimizer steps: it takes the memory of the rank's shard of the
masters (all of them at ZeRO stage 0), and following an update is one pass over it. There are two kinds, several of
either at once; t counts the updates that were applied:

* constant decay d: ``ema = d * ema + (1 - d) * weights``, from the initial weights on, as in the DiT code;
* power profile (Karras et al. 2024, arXiv 2312.02696, section 3.1): the weights of time s count as s^gamma, which is
  the decay ``(1 - 1/t)^(gamma + 1)``. It forgets the initial weights at t = 1. sigma_rel is the profile's standard
  deviation over the length of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from megadit.config.schema.run import EmaConfig
from megadit.engine.deepspeed.partitions import Fragment, Partitions

EMA_PREFIX = "ema/"  # of an average in a checkpoint: ema/NAME
_CHUNK = 1 << 22  # elements exchanged at once by ``swapped``, which bounds its extra memory


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power profile of relative width ``sigma_rel``, in (0, 12^-1/2).

    The positive root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic (section 3.1 of the paper).
    """
    import numpy as np

    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(exponent: float, count: int, every: int = 1) -> float:
    """Decay of a power profile over the last ``every`` of ``count`` updates together, a telescoping product."""
    return (1 - every / count) ** (exponent + 1)


class Ema:
    """The averages that ``config`` names, of the masters of ``partitions``; they start from their present values."""

    def __init__(self, partitions: Partitions, config: EmaConfig) -> None:
        self._partitions = partitions
        every = self._every = config.every
        self._decays: dict[str, Callable[[int], float]] = {}  # by number of updates
        for name, decay in config.constant_decays.items():
            self._decays[name] = partial(lambda constant, count: constant, decay**every)
        for name, sigma in config.power_profiles.items():
            self._decays[name] = partial(power_decay, power_exponent(sigma), every=every)
        # Buffers are identified by id(): they are the same objects for as long as the optimizer lives.
        flats = {id(f.flat): f.flat for f in partitions.fragments()} if self._decays else {}
        self._index = {key: index for index, key in enumerate(flats)}
        self._flats = list(flats.values())
        self._averages = {name: [master.clone() for master in self._masters()] for name in self._decays}
        self._swapped_in: str | None = None
        self._stale_weights = False

    def _masters(self) -> list[Tensor]:
        return [flat.detach().view(-1) for flat in self._flats]

    @property
    def names(self) -> tuple[str, ...]:
        """The averages: ``0.9999`` for a constant decay, ``sigma-0.05`` for a power profile."""
        return tuple(self._decays)

    @torch.no_grad()
    def update(self, count: int, applied: Tensor | None = None) -> None:
        """Follow the masters after the ``count``-th update that changed them (counted from 1 over the whole run).

        applied: () float32 on the device, 1 where the update was applied and 0 where it was skipped; None: applied.
        """
        self._refuse_while_swapped("updated")
        masters = self._masters() if count % self._every == 0 else []
        for name, decay in self._decays.items():
            if not masters:  # a rank may own nothing
                continue
            weight = 1 - decay(count)
            if applied is None:
                torch._foreach_lerp_(self._averages[name], masters, weight)
            else:
                torch._foreach_lerp_(self._averages[name], masters, [applied * weight] * len(masters))

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """``{"ema/NAME": values}`` of a fragment, as writable 1-D float32 views."""
        self._refuse_while_swapped("read or written")
        if not self._decays:
            return {}
        index, count = self._index[id(fragment.flat)], fragment.stop - fragment.start
        return {
            EMA_PREFIX + name: averages[index].narrow(0, fragment.offset, count)
            for name, averages in self._averages.items()
        }

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Inside the block an average takes the place of the weights, in the masters and in the working weights.

        Values are exchanged in small chunks, so that little memory is needed and the weights return bit for bit.
        Nothing may be trained or saved inside. All ranks must enter and leave. After an exception the masters are
        restored at once; the working weights, whose gathering needs all ranks, at ``publish_if_stale``.
        """
        if name not in self._averages:
            raise KeyError(f"there is no average '{name}'; there are {list(self.names)}")
        self._refuse_while_swapped("exchanged once more")
        self._exchange(name)
        self._swapped_in, self._stale_weights = name, True
        try:
            self.publish_if_stale()
            yield
        except BaseException:
            self._put_back(name)
            raise
        self._put_back(name)
        self.publish_if_stale()

    def publish_if_stale(self) -> None:
        """Copy the masters into the working weights if an exception in ``swapped`` has prevented it (collective)."""
        if self._stale_weights:
            self._partitions.publish_masters()
            self._stale_weights = False

    def _put_back(self, name: str) -> None:
        self._exchange(name)
        self._swapped_in, self._stale_weights = None, True

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        for master, average in zip(self._masters(), self._averages[name], strict=True):
            for a, b in zip(master.split(_CHUNK), average.split(_CHUNK), strict=True):
                copy = a.clone()
                a.copy_(b)
                b.copy_(copy)

    def _refuse_while_swapped(self, action: str) -> None:
        if self._swapped_in is not None:
            raise RuntimeError(f"averages cannot be {action} while '{self._swapped_in}' is in the place of the weights")
