"""Which keys are read only under some choice: a key that nothing would read is refused, not ignored.

``READ_WHERE`` says of a key by which other key it is decided and under which of its values it is read; every other key
of the schema is read in every run (``tests/config/test_every_key_is_read.py`` walks all of them, and asks that a new
key be entered). What a key's own section can judge alone, such as keys of one family, stays in that section's
validator.

The table stands here and not beside each reader: readers import torch, and a refusal comes before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megadit.config.family import family_spec
from megadit.config.schema.model import OF_SOME_FAMILIES
from megadit.config.schema.optim import ClipGroups
from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import section_of, walk
from megadit.config.schema.values import shown
from megadit.errors import UserError, few_lines
from megadit.extensions import DATA_SOURCES, FAMILIES


@dataclass(frozen=True)
class ReadCondition:
    """The value of ``key`` decides: one of ``values``, or for numbers and optional sections ``holds``."""

    key: str
    values: tuple[Any, ...] = ()
    holds: Callable[[Any], bool] | None = None
    remedy: str = ""
    instead: tuple[str, ...] = ()  # keys that may hold in the place of ``key``
    # Its default decides nothing, since what follows, such as a study's variants, may still choose; and what was
    # inherited, or stands in the same file, stays, since checkpoints and studies of before have it.
    where_said: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that decide; one that holds is enough."""
        return (self.key, *self.instead)

    def reads(self, value: Any) -> bool:
        """Whether a key that hangs on this choice is read."""
        return self.holds(value) if self.holds is not None else value in self.values

    @property
    def advice(self) -> str:
        """The setting under which the key is read."""
        return self.remedy or f"{self.key}={self.values[0]}"


def _positive(value: Any) -> bool:
    return value is not None and value > 0


def _by_source(key: str, remedy: str) -> ReadCondition:
    """Whether the data source reads ``data.<key>``; a name that is none is refused as that."""
    read = lambda name: name not in DATA_SOURCES or key in DATA_SOURCES.get(name).reads  # noqa: E731
    return ReadCondition("data.name", holds=read, remedy=remedy)


def _by_family(key: str) -> ReadCondition:
    """Whether the family reads ``model.<key>``; a name that is none is refused as that."""
    return ReadCondition("model.family", holds=lambda name: name not in FAMILIES or key in family_spec(name).keys)


def _but_for(key: str, values: tuple[str, ...], remedy: str) -> ReadCondition:
    """Read under all values but these: a plugin's may read it."""
    return ReadCondition(key, holds=lambda value: value not in values, remedy=remedy)


_TEXT = ReadCondition("data.condition", ("text",))
_SEEN = ReadCondition("data.features.encoder", ("efficientnet-lite0", "dinov2"))
_FLOW, _DDPM = ReadCondition("objective.kind", ("flow",)), ReadCondition("objective.kind", ("ddpm",))
_NORMAL = ReadCondition("objective.time_sampling", ("logit_normal",))
_MUP = ReadCondition("model.parametrization", ("mup",))
_BASE = ReadCondition("model.parametrization", ("mup",), where_said=True)
_VALIDATED = ReadCondition("train.validation_images", holds=_positive, remedy="train.validation_images above 0")
_AVERAGED = ReadCondition("ema.decays", holds=bool, remedy="ema.decays, such as [0.9999]", instead=("ema.sigma_rels",))
_HELD_OUT = ReadCondition("data.val_fraction", holds=_positive, remedy="data.val_fraction above 0")

# Key, or section with all in it: the choices under which it is read, each of which must hold.
READ_WHERE: Mapping[str, tuple[ReadCondition, ...]] = {
    "data.path": (_by_source("path", "data.name=image-folder"),),
    "data.skin_tones": (_by_source("skin_tones", "data.name=emoji"),),
    "data.crop": (_by_source("crop", "data.name=image-folder"),),
    "data.text": (_TEXT,),
    "data.max_missing_captions": (_TEXT,),
    "data.text.pooled_path": (_TEXT, ReadCondition("data.text.pooled", ("clip",))),
    "data.features": (ReadCondition("objective.repa_weight", holds=_positive, remedy="objective.repa_weight above 0"),),
    "data.features.path": (ReadCondition("data.features.encoder", ("dinov2",)),),
    "data.features.image_size": (_SEEN,),
    "data.features.cache": (_SEEN,),
    **{f"model.{key}": (_by_family(key),) for key in OF_SOME_FAMILIES},
    "model.base_width": (_BASE,),
    "objective.prediction": (_DDPM,),
    "objective.diffusion_steps": (_DDPM,),
    "objective.beta_schedule": (_DDPM,),
    "objective.weighting": (_DDPM,),
    "objective.min_snr_gamma": (_DDPM, ReadCondition("objective.weighting", ("min_snr",))),
    "objective.time_sampling": (_FLOW,),
    "objective.logit_mean": (_FLOW, _NORMAL),
    "objective.logit_std": (_FLOW, _NORMAL),
    "objective.shift": (_FLOW,),
    "objective.label_dropout": (ReadCondition("data.condition", ("class", "text")),),
    "optim.eps_mode": (_MUP,),
    "optim.wd_mode": (_MUP,),
    "optim.decay_steps": (_but_for("optim.schedule", ("constant", "cosine"), "optim.schedule=wsd"),),
    "optim.min_lr_ratio": (_but_for("optim.schedule", ("constant",), "optim.schedule=cosine"),),
    "optim.clip.groups": (ReadCondition("optim.clip.mode", ("per_group",)),),
    "ema.every": (_AVERAGED,),
    "train.validate_every": (_VALIDATED, _HELD_OUT),
    "train.validate_with": (_VALIDATED, _HELD_OUT),
    "train.init_from_ema": (ReadCondition("train.init_from", holds=bool, remedy="train.init_from"),),
    "sample.prompts": (_TEXT,),
}

# Keys that their own section refuses, with a sentence of its own.
CHECKED_BY_SECTION = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "model": OF_SOME_FAMILIES,
        "objective": ("prediction", "weighting", "beta_schedule", "time_sampling", "shift"),
        "optim": ("decay_steps", *(f"clip.groups.{role}" for role in ClipGroups.model_fields)),
        "train": ("init_from_ema",),
        "sample": ("prompts",),
    }.items()
    for key in keys
)

# What a DeepSpeed file may still choose; such keys are judged when it has been merged.
_DEFERRED = "optim.schedule"


def read_conditions(key: str) -> tuple[ReadCondition, ...]:
    """The choices on which ``key`` hangs, those of the sections that hold it first; none if it is always read."""
    pieces = key.split(".")
    above = (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))
    found = [choice for name in above for choice in READ_WHERE.get(name, ())]
    return tuple(dict.fromkeys(found))


def is_read(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a run of the flat ``values`` reads ``key``; what they leave out is at its default."""
    fields = dict(walk(RunConfig))
    return all(_holds(choice, values, fields) for choice in read_conditions(key))


def drop_unread(
    values: dict[str, Any], sources: dict[str, str], order: Mapping[str, int], resolved: frozenset[str], only: str = ""
) -> None:
    """Take the keys out of the merged ``values`` (and ``sources``) that nothing would read.

    A key that a later layer overruled by its choice goes in silence: an inherited ``beta_schedule`` beside
    ``objective.kind=flow``. A key at its default says nothing; nor does one of a configuration that was written with
    every key (``resolved``), which stays as it is.

    Args:
        order: the layer, counted from the lowest, that said each key.
        only: a section; choices outside of it are not looked at, since the command reads nothing else.

    Raises:
        UserError: a key that was asked for is not read, with the choice that decides it.
    """
    fields = dict(walk(RunConfig))
    problems = []
    for key in list(values):
        if key not in fields or key in resolved or _is_default(key, values[key], fields):
            continue
        for choice in read_conditions(key):
            later = choice.key == _DEFERRED and key not in CHECKED_BY_SECTION
            said = max(order.get(name, -1) for name in choice.keys)
            undecided = later or not choice.key.startswith(only) or (choice.where_said and said < 0)
            if undecided or _holds(choice, values, fields):
                continue
            if said > order[key] or (choice.where_said and said == order[key]):
                if not choice.where_said:
                    del values[key], sources[key]
            elif key not in CHECKED_BY_SECTION:
                problems.append(_refusal(key, values[key], choice, _value(choice.key, values, fields), sources[key]))
            break
    if problems:
        raise UserError(few_lines(problems))


def check_deferred(values: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    """As ``drop_unread``, of the keys that a DeepSpeed file may give or take a reader; ``asked``: where each was said.

    ``values``: the flat configuration with what that file says. Raises UserError.
    """
    fields = dict(walk(RunConfig))
    for key, choices in READ_WHERE.items():
        for choice in choices:
            chosen = values.get(choice.key)
            if choice.key != _DEFERRED or key not in asked or choice.reads(chosen) or key in CHECKED_BY_SECTION:
                continue
            if not _is_default(key, values[key], fields):
                raise UserError(_refusal(key, values[key], choice, chosen, asked[key]))


def _holds(choice: ReadCondition, values: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    return any(choice.reads(_value(key, values, fields)) for key in choice.keys)


def _value(key: str, values: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    return values.get(key, fields[key].default)


def _is_default(key: str, value: Any, fields: Mapping[str, Any]) -> bool:
    if section_of(fields[key].annotation) is not None:
        return value is None
    return bool(value == fields[key].default)


def _refusal(key: str, value: Any, choice: ReadCondition, chosen: Any, source: str) -> str:
    return (
        f"{key}: {shown(value)} is not read where {choice.key} is {shown(chosen).strip(chr(39))}; leave it out, or set "
        f"{choice.advice} (in {source})"
    )
