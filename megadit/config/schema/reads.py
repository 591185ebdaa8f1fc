"""Refuses keys that the run would not read, under the values of other keys.

``READ_WHERE`` lists the keys that are read under some values of another key only; every other key is read in every run
(``tests/config/test_every_key_is_read.py`` walks all keys and requires an entry for a new one). Constraints within one
section are checked by the section's own validator.

The table stands here and not beside the code that reads the keys, which imports torch: a refusal comes before that.
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
    """A condition under which other keys are read: ``key`` has one of ``values``, or ``holds`` is true of its value."""

    key: str
    values: tuple[Any, ...] = ()
    holds: Callable[[Any], bool] | None = None
    remedy: str = ""
    instead: tuple[str, ...] = ()  # keys of which one may fulfil the condition instead of ``key``
    # The condition counts only where ``key`` is set, since a study's variants may set it later; and a key of an earlier
    # or the same layer is left as it is, since older checkpoints and studies have it.
    only_if_set: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the condition, of which one must fulfil it."""
        return (self.key, *self.instead)

    def is_met(self, value: Any) -> bool:
        """Whether ``value``, of one of ``keys``, fulfils the condition."""
        return self.holds(value) if self.holds is not None else value in self.values

    @property
    def advice(self) -> str:
        """A setting that fulfils the condition, as an override."""
        return self.remedy or f"{self.key}={self.values[0]}"


def _positive(value: Any) -> bool:
    return value is not None and value > 0


def _by_source(key: str, remedy: str) -> ReadCondition:
    """The data source reads ``data.<key>``; an unknown source is refused elsewhere."""
    read = lambda name: name not in DATA_SOURCES or key in DATA_SOURCES.get(name).reads  # noqa: E731
    return ReadCondition("data.name", holds=read, remedy=remedy)


def _by_family(key: str) -> ReadCondition:
    """The family reads ``model.<key>``; an unknown family is refused elsewhere."""
    return ReadCondition("model.family", holds=lambda name: name not in FAMILIES or key in family_spec(name).keys)


def _except(key: str, values: tuple[str, ...], remedy: str) -> ReadCondition:
    """``key`` has none of ``values``; a plugin's value may read the key."""
    return ReadCondition(key, holds=lambda value: value not in values, remedy=remedy)


_TEXT = ReadCondition("data.condition", ("text",))
_IMAGE_ENCODER = ReadCondition("data.features.encoder", ("efficientnet-lite0", "dinov2"))
_FLOW, _DDPM = ReadCondition("objective.kind", ("flow",)), ReadCondition("objective.kind", ("ddpm",))
_NORMAL = ReadCondition("objective.time_sampling", ("logit_normal",))
_MUP = ReadCondition("model.parametrization", ("mup",))
_BASE = ReadCondition("model.parametrization", ("mup",), only_if_set=True)
_VALIDATED = ReadCondition("train.validation_images", holds=_positive, remedy="train.validation_images above 0")
_AVERAGED = ReadCondition("ema.decays", holds=bool, remedy="ema.decays, such as [0.9999]", instead=("ema.sigma_rels",))
_HELD_OUT = ReadCondition("data.val_fraction", holds=_positive, remedy="data.val_fraction above 0")

# Key, or section with all of its keys: the conditions under which it is read, all of which must hold.
READ_WHERE: Mapping[str, tuple[ReadCondition, ...]] = {
    "data.path": (_by_source("path", "data.name=image-folder"),),
    "data.skin_tones": (_by_source("skin_tones", "data.name=emoji"),),
    "data.crop": (_by_source("crop", "data.name=image-folder"),),
    "data.text": (_TEXT,),
    "data.max_missing_captions": (_TEXT,),
    "data.text.pooled_path": (_TEXT, ReadCondition("data.text.pooled", ("clip",))),
    "data.features": (ReadCondition("objective.repa_weight", holds=_positive, remedy="objective.repa_weight above 0"),),
    "data.features.path": (ReadCondition("data.features.encoder", ("dinov2",)),),
    "data.features.image_size": (_IMAGE_ENCODER,),
    "data.features.cache": (_IMAGE_ENCODER,),
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
    "optim.decay_steps": (_except("optim.schedule", ("constant", "cosine"), "optim.schedule=wsd"),),
    "optim.min_lr_ratio": (_except("optim.schedule", ("constant",), "optim.schedule=cosine"),),
    "optim.clip.groups": (ReadCondition("optim.clip.mode", ("per_group",)),),
    "ema.every": (_AVERAGED,),
    "train.fp8": (ReadCondition("train.precision", ("fp8",)),),
    "train.validate_every": (_VALIDATED, _HELD_OUT),
    "train.validate_with": (_VALIDATED, _HELD_OUT),
    "train.init_from_ema": (ReadCondition("train.init_from", holds=bool, remedy="train.init_from"),),
    "sample.prompts": (_TEXT,),
}

# Keys that the validator of their own section refuses, with its own sentence.
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

# A key that a DeepSpeed file may still set; conditions on it are checked after the merge.
_DEFERRED = "optim.schedule"


def read_conditions(key: str) -> tuple[ReadCondition, ...]:
    """The conditions under which ``key`` is read, those of its sections first; none if it is always read."""
    parts = key.split(".")
    names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return tuple(dict.fromkeys(condition for name in names for condition in READ_WHERE.get(name, ())))


def is_read(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a run of ``values``, by dotted key and with defaults for missing ones, reads ``key``."""
    fields = dict(walk(RunConfig))
    return all(_holds(condition, values, fields) for condition in read_conditions(key))


def drop_unread(
    values: dict[str, Any], sources: dict[str, str], order: Mapping[str, int], resolved: frozenset[str], only: str = ""
) -> None:
    """Remove from the merged ``values`` (and ``sources``) the keys that the run would not read.

    A key is removed silently where a later layer decided against it: an inherited ``beta_schedule`` under
    ``objective.kind=flow``. A key at its default, or of a configuration written with every key (``resolved``), is left
    as it is.

    Args:
        order: index of the layer that set each key, from the lowest.
        only: a section (``data.``); conditions on keys outside of it are not checked.

    Raises:
        UserError: keys that the user set are not read, each with its condition.
    """
    fields = dict(walk(RunConfig))
    problems = []
    for key in list(values):
        if key not in fields or key in resolved or _is_default(key, values[key], fields):
            continue
        for condition in read_conditions(key):
            deferred = condition.key == _DEFERRED and key not in CHECKED_BY_SECTION
            decided_by = max(order.get(name, -1) for name in condition.keys)
            undecided = deferred or not condition.key.startswith(only) or (condition.only_if_set and decided_by < 0)
            if undecided or _holds(condition, values, fields):
                continue
            if decided_by > order[key] or (condition.only_if_set and decided_by == order[key]):
                if not condition.only_if_set:
                    del values[key], sources[key]
            elif key not in CHECKED_BY_SECTION:
                decisive = _value(condition.key, values, fields)
                problems.append(_refusal(key, values[key], condition, decisive, sources[key]))
            break
    if problems:
        raise UserError(few_lines(problems))


def check_deferred(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse keys in ``sources`` that are not read under a key which a DeepSpeed file may set, after its merge.

    ``values``: by dotted key, the merged configuration. Raises UserError.
    """
    fields = dict(walk(RunConfig))
    for key, conditions in READ_WHERE.items():
        for condition in conditions:
            decisive = values.get(condition.key)
            if condition.key != _DEFERRED or key not in sources or key in CHECKED_BY_SECTION:
                continue
            if not condition.is_met(decisive) and not _is_default(key, values[key], fields):
                raise UserError(_refusal(key, values[key], condition, decisive, sources[key]))


def _holds(condition: ReadCondition, values: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    return any(condition.is_met(_value(key, values, fields)) for key in condition.keys)


def _value(key: str, values: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    return values.get(key, fields[key].default)


def _is_default(key: str, value: Any, fields: Mapping[str, Any]) -> bool:
    if section_of(fields[key].annotation) is not None:
        return value is None
    return bool(value == fields[key].default)


def _refusal(key: str, value: Any, condition: ReadCondition, decisive: Any, source: str) -> str:
    shown_value = shown(decisive).strip("'")
    return (
        f"{key}: {shown(value)} is not read where {condition.key} is {shown_value}; leave it out, or set "
        f"{condition.advice} (in {source})"
    )
