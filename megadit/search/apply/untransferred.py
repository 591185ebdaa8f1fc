"""What muTransfer does not carry from the proxy to the target by itself, each as a sentence with both values.

A base HP found on a proxy is good for the target as far as the two differ in what was verified (width, and where
a study says so batch and steps). Everything else that differs is named here, so that it is a decision and no accident.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
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


Lengths = tuple[int | None, int | None]  # optimizer steps of proxy and target, None where not known


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
    proxy: RunConfig, target: RunConfig, lengths: Lengths, verified: Collection[VerifiedRange] = ()
) -> list[Caveat]:
    """Every difference between the proxy's run and the target's that the base HPs are not known to survive.

    ``target`` has the study's values already; ``verified``: over which scales transfer was verified.
    """
    return [
        *_scales(proxy, target, lengths, verified),
        *_weight_decay(proxy, target, lengths),
        *_schedule_shares(proxy, target, lengths),
        *_shape(proxy, target),
        *_other_keys(proxy, target),
    ]


def _caveat(topic: str, name: str, values: tuple[Any, Any], end: str = "", shown: Sequence[Any] = ()) -> Caveat:
    """``name: A at the proxy, B at the target``; A and B are the values, or how they are ``shown``."""
    at_proxy, at_target = shown or values
    return Caveat(topic, f"{name} {at_proxy} at the proxy, {at_target} at the target{end}", *values)


def _scales(
    proxy: RunConfig, target: RunConfig, lengths: Lengths, verified: Collection[VerifiedRange]
) -> Iterator[Caveat]:
    """Width, length and batch, over which a study may have verified the transfer; beyond its span is extrapolation."""
    widths = proxy.model.width, target.model.width
    if why := _unverified("model.width", "width", *widths, verified):
        yield _caveat("width", "width:", widths, f"; {why}")
    ours, theirs = lengths
    shown = _length(proxy, ours), _length(target, theirs)
    if theirs is None or ours is None:
        yield _caveat("horizon", "training length:", lengths, "; the optimum may move with it", shown)
    elif why := _unverified("train.steps", "steps", ours, theirs, verified):
        yield _caveat("horizon", "training length:", lengths, f", {theirs / ours:.3g} times the steps; {why}", shown)
    batches = proxy.train.global_batch, target.train.global_batch
    if why := _unverified("train.global_batch", "batch sizes", *batches, verified):
        yield _caveat("batch", "batch:", batches, f"; {why}")


def _unverified(key: str, name: str, ours: int, theirs: int, verified: Collection[VerifiedRange]) -> str:
    """Why transfer over ``key`` from ``ours`` to ``theirs`` is not known to hold; empty where it is."""
    spans = [span for span in verified if span.key == key]
    if ours == theirs or any(span.low <= theirs <= span.high for span in spans):
        return ""
    if not spans:
        return f"no study given verified transfer over {name}"
    return f"transfer was verified from {' and from '.join(map(str, spans))}, and beyond is extrapolation"


def _weight_decay(proxy: RunConfig, target: RunConfig, lengths: Lengths) -> Iterator[Caveat]:
    per_step = ours, theirs = [config.optim.lr * config.optim.weight_decay for config in (proxy, target)]
    if not any(per_step):
        return
    if lengths[0] is not None and lengths[1] is not None:
        one, other = ours * lengths[0], theirs * lengths[1]
        if abs(one - other) > 0.05 * max(one, other):
            keep = f"; optim.weight_decay={one / (target.optim.lr * lengths[1]):.4g} keeps it" if one else ""
            name, shown = "weight decay over the run: lr x wd x steps is", (f"{one:.4g}", f"{other:.4g}")
            yield _caveat("weight_decay", name, (one, other), keep, shown)
    m, mode = (proxy.model.width_mult, target.model.width_mult), target.optim.wd_mode
    if mode != "independent" and m[0] != m[1]:
        exponent = 1.0 if mode == "constant" else 0.5
        one, other = ours / m[0] ** exponent, theirs / m[1] ** exponent
        name = f"weight decay per step: under wd_mode {mode} a hidden weight decays by"
        end = "; wd_mode independent keeps it equal"
        yield _caveat("weight_decay", name, (one, other), end, (f"{one:.4g}", f"{other:.4g}"))


def _schedule_shares(proxy: RunConfig, target: RunConfig, lengths: Lengths) -> Iterator[Caveat]:
    """What warm-up and the final decay are of the run changes with its length, where they are given in steps."""
    ours, theirs = lengths
    if ours is None or theirs is None:
        return
    for key, topic, name in (("warmup_steps", "warmup", "warm-up:"), ("decay_steps", "final_decay", "final decay:")):
        configured = [getattr(config.optim, key) or 0 for config in (proxy, target)]
        one, other = steps_of(configured[0], ours), steps_of(configured[1], theirs)
        share, share_target = one / ours, other / theirs
        if configured[0] == configured[1] and isinstance(configured[0], str):
            continue  # one share of both, whatever rounding makes of it
        if abs(share - share_target) <= 0.05 * max(share, share_target):
            continue
        if share > 1:
            remedy = f"the proxy's rate ended before it, at {100 / share:.3g}% of optim.lr: choose a warm-up anew"
        else:
            remedy = f"optim.{key}={round(share * theirs)} keeps the share"
        shown = (
            f"{one:,} of {ours:,} steps ({100 * share:.3g}%)",
            f"{other:,} of {theirs:,} ({100 * share_target:.3g}%)",
        )
        yield _caveat(topic, name, (one, other), f"; {remedy}", shown)


def _shape(proxy: RunConfig, target: RunConfig) -> Iterator[Caveat]:
    one, other = proxy.model, target.model
    if one.depth != other.depth:
        end = "; muP scales width, not depth"
        yield _caveat("depth", "depth:", (one.depth, other.depth), end, (f"{one.depth} blocks", other.depth))
    if one.head_channels != other.head_channels:
        end = f"; transfer over width assumes a constant one: model.head_dim={one.head_channels} keeps it"
        yield _caveat("head_dim", "head dim:", (one.head_channels, other.head_channels), end)
    sizes, tokens = (one.input_size, other.input_size), [(m.input_size // m.patch_size) ** 2 for m in (one, other)]
    if sizes[0] != sizes[1] or tokens[0] != tokens[1]:
        shown = f"{sizes[0]} x {sizes[0]}, {tokens[0]} tokens", f"{sizes[1]} x {sizes[1]}, {tokens[1]}"
        end = "; the noise level and the optimum depend on it"
        yield _caveat("resolution", "resolution:", sizes, end, shown)


def _other_keys(proxy: RunConfig, target: RunConfig) -> Iterator[Caveat]:
    """Every other key that differs: data, objective, precision, optimizer, schedule, architecture."""
    one, other = flatten(proxy.model_dump()), flatten(target.model_dump())
    for key in dict.fromkeys([*one, *other]):
        values = one.get(key), other.get(key)
        section = any(name.startswith(f"{key}.") for name in (*one, *other))  # null here, filled in there
        if values[0] != values[1] and not section and not _SILENT.fullmatch(key):
            shown = [value_text(list(value) if isinstance(value, tuple) else value, 6) for value in values]
            yield _caveat(key, f"{key}:", values, shown=shown)


def _length(config: RunConfig, steps: int | None) -> str:
    if steps is None:
        return f"{config.train.epochs:g} epochs"
    return f"{steps:,} steps ({steps * config.train.global_batch:,} images)"
