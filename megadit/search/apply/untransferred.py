"""What muTransfer does not carry from the proxy to the target by itself, each as a sentence with both values.

A base HP found on a proxy is good for the target as far as the two differ in what was verified (width, and where
a study says so batch and steps). Everything else that differs is named here, so that it is a decision and no accident.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from megadit.config import RunConfig
from megadit.config.schema.lengths import steps_of
from megadit.nested import flatten
from megadit.search.wording import value_text

# Keys that change neither the optimum nor the loss, and those that a sentence of their own speaks of.
_SILENT = re.compile(
    r"(sample|parallel)\..*|data\.(workers|path|on_change|on_corrupt|val_fraction|vae\.path|(text|features)\.cache)|optim\.implementation|"
    r"train\.(seed|micro_batch|keep_last|validation_images|tensorboard|wandb|\w+_every|steps|epochs|global_batch)|"
    r"model\.(width|heads|head_dim|depth|input_size)|optim\.(warmup_steps|decay_steps)"
)


@dataclass(frozen=True)
class Caveat:
    """One thing that does not transfer by itself; ``proxy`` and ``target`` are its two values."""

    topic: str
    text: str
    proxy: Any
    target: Any


@dataclass(frozen=True)
class VerifiedRange:
    """The span of a scale key over which a study's verdict is "transfers"."""

    key: str
    low: float
    high: float
    study: str

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} ({self.study})"


def untransferred(
    proxy: RunConfig,
    target: RunConfig,
    lengths: tuple[int | None, int | None],
    verified: Collection[VerifiedRange] = (),
) -> list[Caveat]:
    """Every difference between the proxy's run and the target's that the base HPs are not known to survive.

    ``target`` has the study's values already; ``lengths``: optimizer steps of both, None where not known;
    ``verified``: over which scales transfer was verified.
    """
    return [
        *_scales(proxy, target, lengths, verified),
        *_weight_decay(proxy, target, lengths),
        *_shares(proxy, target, lengths),
        *_shape(proxy, target),
        *_others(proxy, target),
    ]


def _scales(
    proxy: RunConfig, target: RunConfig, lengths: tuple[int | None, int | None], verified: Collection[VerifiedRange]
) -> Iterator[Caveat]:
    """Width, length and batch, over which a study may have verified the transfer; beyond its span is extrapolation."""
    width = proxy.model.width, target.model.width
    if why := _unverified("model.width", "width", *width, verified):
        yield Caveat("width", f"width: {width[0]} at the proxy, {width[1]} at the target; {why}", *width)
    ours, theirs = lengths
    text = f"training length: {_length(proxy, ours)} at the proxy, {_length(target, theirs)} at the target"
    if theirs is None or ours is None:
        yield Caveat("horizon", f"{text}; the optimum may move with it", ours, theirs)
    elif why := _unverified("train.steps", "steps", ours, theirs, verified):
        yield Caveat("horizon", f"{text}, {theirs / ours:.3g} times the steps; {why}", ours, theirs)
    batch = proxy.train.global_batch, target.train.global_batch
    if why := _unverified("train.global_batch", "batch sizes", *batch, verified):
        yield Caveat("batch", f"batch: {batch[0]} at the proxy, {batch[1]} at the target; {why}", *batch)


def _unverified(key: str, what: str, ours: int, theirs: int, verified: Collection[VerifiedRange]) -> str:
    """Why transfer over ``key`` from ``ours`` to ``theirs`` is not known to hold; empty where it is."""
    known = [span for span in verified if span.key == key]
    if ours == theirs or any(span.low <= theirs <= span.high for span in known):
        return ""
    if not known:
        return f"no study given verified transfer over {what}"
    return f"transfer was verified from {' and from '.join(map(str, known))}, and beyond is extrapolation"


def _weight_decay(proxy: RunConfig, target: RunConfig, lengths: tuple[int | None, int | None]) -> Iterator[Caveat]:
    ours, theirs = proxy.optim, target.optim
    if not (ours.weight_decay or theirs.weight_decay):
        return
    if lengths[0] is not None and lengths[1] is not None:
        one, other = (o.lr * o.weight_decay * steps for o, steps in ((ours, lengths[0]), (theirs, lengths[1])))
        if abs(one - other) > 0.05 * max(one, other):
            keep = f"; optim.weight_decay={one / (theirs.lr * lengths[1]):.4g} keeps it" if one else ""
            text = f"weight decay over the run: lr x wd x steps is {one:.4g} at the proxy, {other:.4g} at the target"
            yield Caveat("weight_decay", text + keep, one, other)
    m, m_target = proxy.model.width_mult, target.model.width_mult
    if theirs.wd_mode != "independent" and m != m_target:
        power = 1.0 if theirs.wd_mode == "constant" else 0.5
        one, other = ours.lr * ours.weight_decay / m**power, theirs.lr * theirs.weight_decay / m_target**power
        text = (
            f"weight decay per step: under wd_mode {theirs.wd_mode} a hidden weight decays by {one:.4g} at the proxy, "
            f"{other:.4g} at the target; wd_mode independent keeps it equal"
        )
        yield Caveat("weight_decay", text, one, other)


def _shares(proxy: RunConfig, target: RunConfig, lengths: tuple[int | None, int | None]) -> Iterator[Caveat]:
    """What warm-up and the final decay are of the run changes with its length, where they are given in steps."""
    ours, theirs = lengths
    if ours is None or theirs is None:
        return
    for key, topic in (("warmup_steps", "warm-up"), ("decay_steps", "final decay")):
        given = [getattr(config.optim, key) or 0 for config in (proxy, target)]
        one, other = steps_of(given[0], ours), steps_of(given[1], theirs)
        share, share_target = one / ours, other / theirs
        if given[0] == given[1] and isinstance(given[0], str):
            continue  # one share of both, whatever rounding makes of it
        if abs(share - share_target) <= 0.05 * max(share, share_target):
            continue
        if share > 1:
            remedy = f"the proxy's rate ended before it, at {100 / share:.3g}% of optim.lr: choose a warm-up anew"
        else:
            remedy = f"optim.{key}={round(share * theirs)} keeps the share"
        text = (
            f"{topic}: {one:,} of {ours:,} steps ({100 * share:.3g}%) at the proxy, {other:,} of "
            f"{theirs:,} ({100 * share_target:.3g}%) at the target; {remedy}"
        )
        yield Caveat(topic.replace(" ", "_").replace("-", ""), text, one, other)


def _shape(proxy: RunConfig, target: RunConfig) -> Iterator[Caveat]:
    one, other = proxy.model, target.model
    if one.depth != other.depth:
        text = f"depth: {one.depth} blocks at the proxy, {other.depth} at the target; muP scales width, not depth"
        yield Caveat("depth", text, one.depth, other.depth)
    if one.head_channels != other.head_channels:
        text = (
            f"head dim: {one.head_channels} at the proxy, {other.head_channels} at the target; transfer over width "
            f"assumes a constant one: model.head_dim={one.head_channels} keeps it"
        )
        yield Caveat("head_dim", text, one.head_channels, other.head_channels)
    tokens = [(model.input_size // model.patch_size) ** 2 for model in (one, other)]
    if (one.input_size, tokens[0]) != (other.input_size, tokens[1]):
        text = (
            f"resolution: {one.input_size} x {one.input_size}, {tokens[0]} tokens at the proxy, "
            f"{other.input_size} x {other.input_size}, {tokens[1]} at the target; the noise level and the optimum "
            "depend on it"
        )
        yield Caveat("resolution", text, one.input_size, other.input_size)


def _others(proxy: RunConfig, target: RunConfig) -> list[Caveat]:
    """Every other key that differs: data, objective, precision, optimizer, schedule, architecture."""
    one, other = flatten(proxy.model_dump()), flatten(target.model_dump())
    caveats = []
    for key in dict.fromkeys([*one, *other]):
        ours, theirs = one.get(key), other.get(key)
        section = any(name.startswith(f"{key}.") for name in (*one, *other))  # null here, filled in there
        if ours == theirs or section or _SILENT.fullmatch(key):
            continue
        shown = [value_text(list(v) if isinstance(v, tuple) else v, 6) for v in (ours, theirs)]
        caveats.append(Caveat(key, f"{key}: {shown[0]} at the proxy, {shown[1]} at the target", ours, theirs))
    return caveats


def _length(config: RunConfig, steps: int | None) -> str:
    if steps is None:
        return f"{config.train.epochs:g} epochs"
    return f"{steps:,} steps ({steps * config.train.global_batch:,} images)"
