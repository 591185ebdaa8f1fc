"""Moving averages of the weights, on each rank's share of the float32 masters.

Every average is one buffer beside every buffer that the optimizer steps: its memory on a rank is that of the rank's
share of the masters (all of them at stage 0, which shards nothing), and following an update is one pass over them. Two
kinds, several of either at once; t counts the updates that changed the weights:

* constant decay d: ``ema = d * ema + (1 - d) * weights``, beginning at the initial weights, as the DiT code does it;
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

KIND = "ema/"  # what a checkpoint calls the average NAME: ema/NAME
_CHUNK = 1 << 22  # elements exchanged at once: the only memory that looking through an average takes


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power profile of relative width ``sigma_rel``, in (0, 12^-1/2).

    The positive root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic (section 3.1 of the paper).
    """
    import numpy as np

    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(exponent: float, count: int, every: int = 1) -> float:
    """What a power profile keeps of the average over the last ``every`` of ``count`` updates: a telescoping product."""
    return (1 - every / count) ** (exponent + 1)


class Ema:
    """The averages that ``config`` names, over what ``partitions`` owns; they begin at the present masters."""

    def __init__(self, partitions: Partitions, config: EmaConfig) -> None:
        self._partitions = partitions
        every = self._every = config.every
        self._kept: dict[str, Callable[[int], float]] = {}  # share of the old average, by number of updates
        for name, decay in config.constant_decays.items():
            self._kept[name] = partial(lambda kept, count: kept, decay**every)
        for name, sigma in config.power_profiles.items():
            self._kept[name] = partial(power_decay, power_exponent(sigma), every=every)
        # A buffer is known by its identity: it is the same object for as long as the optimizer lives.
        flats = {id(f.flat): f.flat for f in partitions.fragments()} if self._kept else {}
        self._place = {key: place for place, key in enumerate(flats)}
        self._flats = list(flats.values())
        self._averages = {name: [master.clone() for master in self._masters()] for name in self._kept}
        self._shown: str | None = None
        self._unpublished = False

    def _masters(self) -> list[Tensor]:
        return [flat.detach().view(-1) for flat in self._flats]

    @property
    def names(self) -> tuple[str, ...]:
        """The averages: ``0.9999`` for a constant decay, ``sigma-0.05`` for a power profile."""
        return tuple(self._kept)

    @torch.no_grad()
    def update(self, count: int, applied: Tensor | None = None) -> None:
        """Follow the masters after the ``count``-th update that changed them (counted from 1 over the whole run).

        applied: () float32 on the device, 1 where the update was applied and 0 where it was skipped; None: applied.
        """
        self._refuse_while_shown("updated")
        masters = self._masters() if count % self._every == 0 else []
        for name, kept in self._kept.items():
            if not masters:  # a rank may own nothing
                continue
            weight = 1 - kept(count)
            if applied is None:
                torch._foreach_lerp_(self._averages[name], masters, weight)
            else:
                torch._foreach_lerp_(self._averages[name], masters, [applied * weight] * len(masters))

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """``{"ema/NAME": values}`` of a fragment, as writable 1-D float32 views."""
        self._refuse_while_shown("read or written")
        if not self._kept:
            return {}
        place, count = self._place[id(fragment.flat)], fragment.stop - fragment.start
        return {
            KIND + name: averages[place].narrow(0, fragment.offset, count) for name, averages in self._averages.items()
        }

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Put an average in the place of the weights, masters and working weights alike, and put them back after.

        Values change places, so that nothing is copied beyond a small piece at a time and what comes back is what was
        there, bit for bit. Nothing may be trained or saved inside. All ranks must enter and leave. After an exception
        the masters are back at once; the working weights, whose gathering needs all ranks, at ``publish_if_stale``.
        """
        if name not in self._averages:
            raise KeyError(f"there is no average '{name}'; there are {list(self.names)}")
        self._refuse_while_shown("exchanged once more")
        self._exchange(name)
        self._shown, self._unpublished = name, True
        try:
            self.publish_if_stale()
            yield
        except BaseException:
            self._put_back(name)
            raise
        self._put_back(name)
        self.publish_if_stale()

    def publish_if_stale(self) -> None:
        """Give the working weights the masters' values where an exception kept that from being done (collective)."""
        if self._unpublished:
            self._partitions.publish_masters()
            self._unpublished = False

    def _put_back(self, name: str) -> None:
        self._exchange(name)
        self._shown, self._unpublished = None, True

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        for master, average in zip(self._masters(), self._averages[name], strict=True):
            for here, there in zip(master.split(_CHUNK), average.split(_CHUNK), strict=True):
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)

    def _refuse_while_shown(self, what: str) -> None:
        if self._shown is not None:
            raise RuntimeError(f"averages cannot be {what} while '{self._shown}' is in the place of the weights")
