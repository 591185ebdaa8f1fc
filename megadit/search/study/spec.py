"""The schema of a study file: ``StudySpec``, every key of ``configs/sweeps/*.yaml``, and the checks of the file alone.

What needs the base configuration (existing keys, allowed values) is checked by ``study.study``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from megadit.config.loading.layers import merge
from megadit.config.loading.messages import validated
from megadit.config.loading.sources import ConfigLayer, display, read_yaml
from megadit.config.schema.registered import Plugins
from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import Section, walk
from megadit.config.schema.values import coerce, resolve_scalars
from megadit.errors import UserError, did_you_mean
from megadit.nested import unflatten

LISTED = ("grid", "choice")
KINDS = (*LISTED, "uniform", "log_uniform")
# Keys whose effect shows late: a high rate or a short warm-up leads early and loses in the end.
_SCHEDULE_KEY = re.compile(r"optim\.(lr|warmup_steps|schedule|decay_steps|min_lr_ratio)|model\.role_hps\.\w+\.lr")
_NAME = re.compile(r"[\w.+-]+")


def as_config_value(key: str, value: Any) -> Any:
    """A value as the configuration key ``key`` takes it; a list stays a list for JSON."""
    field = dict(walk(RunConfig)).get(key)
    coerced = resolve_scalars(value) if field is None else coerce(value, field)
    return list(coerced) if isinstance(coerced, tuple) else coerced


def _by_key(convert: Callable[[str, Any], Any]) -> BeforeValidator:
    """Each value of a mapping by dotted configuration keys becomes ``convert(key, value)``."""
    return BeforeValidator(
        lambda values: {k: convert(k, v) for k, v in values.items()} if isinstance(values, Mapping) else values
    )


def _config_lists(key: str, spec: Any) -> Any:
    """A dimension with each listed value as its key takes it."""
    lists = [kind for kind in LISTED if isinstance(spec, Mapping) and isinstance(spec.get(kind), list | tuple)]
    return {**spec, **{kind: tuple(as_config_value(key, v) for v in spec[kind]) for kind in lists}} if lists else spec


Changes = Annotated[dict[str, Any], _by_key(as_config_value)]


def _refuse_repeated(key: str, values: Sequence[Any]) -> None:
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"{key}: {list(values)} has a value twice; list each once")


class ItemSection(Section):
    """A section in a list or under a free name; an unknown key is refused with the keys that there are."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                remedy = did_you_mean(str(key), cls.model_fields, f"give one of {', '.join(cls.model_fields)}")
                raise ValueError(f"{key}: no such key; {remedy}")
        return values


class DimensionSpec(ItemSection):
    """The values that one searched key may take, in exactly one of four ways."""

    grid: tuple[Any, ...] | None = Field(None, description="these values, in this order")
    choice: tuple[Any, ...] | None = Field(None, description="these values, which have no order")
    uniform: tuple[float, float] | None = Field(None, description="[low, high], every value as likely")
    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], every factor as likely")

    @property
    def kind(self) -> str:
        """The one of the four that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The listed values, or the two bounds."""
        return tuple(getattr(self, self.kind))

    @model_validator(mode="after")
    def _one_kind(self) -> DimensionSpec:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            problem = f"{' and '.join(kinds)} are both given" if kinds else "nothing is given"
            raise ValueError(f"{kinds[0] if kinds else 'grid'}: {problem}; give exactly one of {', '.join(KINDS)}")
        kind, values = self.kind, self.values
        if kind in LISTED:
            if not values:
                raise ValueError(f"{kind}: is empty; list at least one value")
            _refuse_repeated(kind, values)
        elif values[0] >= values[1]:
            raise ValueError(f"{kind}: {list(values)} has no room; give [low, high] with low below high")
        elif kind == "log_uniform" and values[0] <= 0:
            raise ValueError(f"{kind}: {list(values)} needs a low bound above 0; raise it, or use uniform")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}


class ScaleSpec(Section):
    """What grows from the proxy to the target, and the values at which the study looks."""

    key: Literal["model.width", "train.global_batch", "train.steps"] = Field(description="the key that is scaled")
    values: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, description="its values")
    proxy: int | None = Field(None, description="the value whose optimum is transferred; default: the smallest")

    @model_validator(mode="after")
    def _consistent(self) -> ScaleSpec:
        _refuse_repeated("values", self.values)
        if self.proxy is not None and self.proxy not in self.values:
            raise ValueError(f"proxy: {self.proxy} is not among the values {list(self.values)}; choose one of them")
        return self

    @property
    def proxy_value(self) -> int:
        """``proxy``, by default the smallest value."""
        return min(self.values) if self.proxy is None else self.proxy


class ProxySpec(Section):
    """Length and batch of every trial, unless they are what is scaled."""

    steps: int | None = Field(None, ge=1, description="train.steps of all trials")
    batch: int | None = Field(None, ge=1, description="train.global_batch of all trials")


class ScoreSpec(ItemSection):
    """One number by which trials are compared."""

    name: str = Field(description="what it is called in tables")
    kind: Literal["train_loss", "val_loss", "command"] = Field(
        description="mean training loss over the last steps, fixed-noise validation loss, or what a command measures"
    )
    last: int = Field(100, ge=1, description="train_loss: over how many steps")
    command: tuple[str, ...] | None = Field(
        None, description="command: its words; {run_dir} is the trial's folder; it prints one JSON object"
    )
    key: str | None = Field(None, description="command: the key of its JSON object that is the score")
    lower_is_better: bool = Field(True, description="false for scores such as IS or recall")

    @property
    def sign(self) -> float:
        """What makes lower values the better ones."""
        return 1.0 if self.lower_is_better else -1.0

    @model_validator(mode="after")
    def _consistent(self) -> ScoreSpec:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} is not made of letters, digits, '_', '-', '.'; choose another")
        if self.kind == "command":
            if not self.command:
                raise ValueError("command: is missing; give the words of the command that measures this score")
            if not self.key:
                raise ValueError("key: is missing; name the key of the command's JSON object that is the score")
        elif self.command is not None or self.key is not None:
            key = "command" if self.command is not None else "key"
            raise ValueError(f"{key}: belongs to kind command, not {self.kind}; leave it out")
        elif not self.lower_is_better:
            raise ValueError(f"lower_is_better: false does not fit kind {self.kind}, a loss; leave it out")
        if self.kind != "train_loss" and "last" in self.model_fields_set and self.last != 100:
            raise ValueError(f"last: belongs to kind train_loss, not {self.kind}; leave it out")
        return self


class SelectSpec(Section):
    """How the winning point is chosen."""

    rule: Literal["best", "mean_rank", "conservative"] = Field(
        "best",
        description="best: lowest mean over seeds; mean_rank: lowest mean rank over all scores; conservative: of "
        "the points within a standard error of the best, the one with the smallest first hyperparameter",
    )
    score: str | None = Field(None, description="by which score; default: the first")


class PruningSpec(Section):
    """Whether trials that do badly early are ended."""

    rule: Literal["none", "median", "halving"] = Field("none", description="how a trial is judged against the others")
    every: int = Field(100, ge=1, description="steps between judgements")
    after: int = Field(200, ge=0, description="no judgement before this step")
    judge_learning_rate: bool = Field(
        False, description="allow early loss to judge learning rates and warm-up, which it misjudges"
    )


class WorkersSpec(Section):
    """The local workers that ``run`` starts."""

    count: int = Field(1, ge=1, description="how many at once")
    cores: int = Field(1, ge=1, description="CPU cores of each")
    gpus: int = Field(0, ge=0, description="GPUs of each; above 1 a trial runs through torchrun")


class StudySpec(Section):
    """A study: which runs are made, how they are scored and how one of them is chosen."""

    # Keys that a study sets itself, run by run.
    own_keys: ClassVar[Mapping[str, str]] = {"train.seed": "seeds", "plugins": "plugins"}

    name: str = Field(description="default: the file's name")
    description: str = Field("", description="one sentence for the report")
    base: str | dict[str, Any] = Field(description="a run configuration: a file, or its sections in place")
    overrides: Changes = Field({}, description="dotted configuration keys that are the same in all trials")
    variants: dict[str, Changes] = Field({}, description="name: dotted keys; run side by side, the first judged")
    scale: ScaleSpec | None = Field(None, description="what grows from proxy to target")
    space: Annotated[dict[str, DimensionSpec], _by_key(_config_lists)] = Field(
        description="dotted configuration key: the values it may take"
    )
    sampler: Literal["random", "qmc", "tpe", "grid"] = Field("random", description="how points of the space are chosen")
    trials: int | None = Field(None, ge=1, description="number of points for random, qmc and tpe")
    seeds: tuple[int, ...] = Field((0,), description="train.seed: every point runs with each (tpe: in turn)")
    sampler_seed: int = Field(0, ge=0, description="of the points")
    proxy: ProxySpec = ProxySpec()
    scores: tuple[ScoreSpec, ...] = Field(
        (ScoreSpec(name="train_loss", kind="train_loss"),), description="the first is the default everywhere"
    )
    select: SelectSpec = SelectSpec()
    pruning: PruningSpec = PruningSpec()
    diverged_above: float | None = Field(
        1.0, gt=0, description="diverged: final training loss above this x the first; null: only when not finite"
    )
    storage: Literal["sqlite", "journal"] = Field("sqlite", description="journal: for a file system of several hosts")
    workers: WorkersSpec = WorkersSpec()
    keep: tuple[Literal["checkpoint", "samples", "tensorboard", "curves"], ...] = Field(
        (), description="what trials keep beside their metrics"
    )
    max_attempts: int = Field(3, ge=1, description="how often a trial is started whose worker dies")
    stale_after_s: float = Field(300.0, gt=0, description="a remote worker silent for so long is dead")
    plugins: Plugins = Field((), description="modules to import first: docs/extending.md")

    @model_validator(mode="after")
    def _consistent(self) -> StudySpec:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    @property
    def has_commands(self) -> bool:
        """Whether a command measures a score, which looks at a finished run."""
        return any(score.kind == "command" for score in self.scores)

    @property
    def selection_score(self) -> ScoreSpec:
        """The score of ``select``, by default the first."""
        return self.score(self.select.score)

    def score(self, name: str | None) -> ScoreSpec:
        """The score called ``name`` (None: the first). Raises UserError for another name."""
        for score in self.scores:
            if name in (None, score.name):
                return score
        known = ", ".join(score.name for score in self.scores)
        raise UserError(f"score: {name} is not a score of this study, which has {known}")

    def set_by(self, key: str) -> str | None:
        """Which part of the study sets the configuration key ``key`` for each run, if any does."""
        scaled: dict[str, str] = {} if self.scale is None else {self.scale.key: "scale"}
        return {**dict.fromkeys(self.space, "space"), **scaled, **self.own_keys}.get(key)

    def _problems(self) -> Iterator[str]:
        """What cannot be or does not fit together, each as a sentence that begins with its key."""
        for key, names in (("name", [self.name]), ("variants", list(self.variants))):
            for name in names:
                if not _NAME.fullmatch(name):
                    yield f"{key}: {name!r} is not made of letters, digits, '_', '-', '.'; choose another"
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {list(self.seeds)} must be one or more different whole numbers from 0; e.g. [0, 1]"
        if not self.space:
            yield "space: is empty; name at least one configuration key and its values"
        yield from self._sampler_problems()
        yield from self._score_problems()
        yield from self._keys_set_twice()
        rates = [key for key in self.space if _SCHEDULE_KEY.fullmatch(key)]
        if rates and self.pruning.rule != "none" and not self.pruning.judge_learning_rate:
            yield (
                f"pruning.rule: {self.pruning.rule} would judge {rates[0]} by early loss, where high rates and short "
                "warm-ups lead; use none, or set pruning.judge_learning_rate: true"
            )

    def _sampler_problems(self) -> Iterator[str]:
        if self.sampler == "grid":
            for key, dimension in self.space.items():
                if dimension.kind not in LISTED:
                    yield f"sampler: grid needs listed values, but space.{key} is {dimension.kind}; use random or qmc"
            if self.trials is not None:
                yield f"trials: {self.trials} does not go with sampler grid, which runs every point; leave it out"
        elif self.trials is None:
            yield f"trials: is missing; say how many points sampler {self.sampler} tries, or use sampler grid"
        cells = max(1, len(self.variants)) * (1 if self.scale is None else len(self.scale.values))
        if self.sampler == "tpe" and cells > 1:
            yield (
                f"sampler: tpe learns from one kind of run, but variants and scale make {cells}; use random, qmc or "
                "grid, or search the proxy alone"
            )

    def _score_problems(self) -> Iterator[str]:
        names = [score.name for score in self.scores]
        if not names:
            yield "scores: is empty; leave it out for the training loss over the last 100 steps"
        if len(set(names)) < len(names):
            yield f"scores: {', '.join(names)} has a name twice; give each score its own"
        if self.select.score is not None and self.select.score not in names:
            hint = did_you_mean(self.select.score, names)
            yield f"select.score: {self.select.score} is not among the scores; {hint}"
        if self.select.rule == "conservative" and (len(self.seeds) < 2 or self.sampler == "tpe"):
            why = "of which sampler tpe gives each point one" if self.sampler == "tpe" else "so give more seeds"
            yield f"select.rule: conservative needs the spread over two or more seeds, {why}; or use best"

    def _keys_set_twice(self) -> Iterator[str]:
        """Keys of which one of two settings would do nothing."""
        parts = {"overrides": self.overrides, "space": self.space}
        parts |= {f"variants.{name}": changes for name, changes in self.variants.items()}
        for part, key in ((part, key) for part, keys in parts.items() for key in keys):
            setter = self.set_by(key)
            if setter is not None and not part == setter == "space":
                yield f"{part}.{key}: is set by {setter} of the study; leave it out here"
        if self.scale is not None:
            for name, key in (("steps", "train.steps"), ("batch", "train.global_batch")):
                if getattr(self.proxy, name) is not None and self.scale.key == key:
                    yield f"proxy.{name}: is what scale.values gives; leave it out"


def read_spec(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read and check the study file at ``path``, with ``overrides`` (dotted study keys) laid over it.

    Raises UserError that names every wrong key with its value and the remedy.
    """
    file = Path(path)
    values = read_yaml(file)
    if "model" in values and not values.keys() & {"space", "scale", "variants"}:
        raise UserError(
            f"--config: {display(file)} is a run's configuration, not a study; name a study, whose base it may be"
        )
    values.setdefault("name", file.stem)
    layers = [ConfigLayer(values, display(file))]
    if overrides:
        changes = unflatten(overrides)
        if isinstance(changes.get("space"), dict):
            changes["space"] = _overridden_space(values.get("space"), changes["space"])
        layers.append(ConfigLayer(changes, "an override"))
    merged = merge(layers, StudySpec)
    return validated(StudySpec, unflatten(merged.values), merged.sources)


def _overridden_space(space: Any, override: dict[str, Any]) -> dict[str, Any]:
    """The space after an override: ``space={...}`` is all of it, ``space.optim.lr={...}`` one key of it."""
    dotted = dict(_dotted(override, ""))
    replaces = dotted.keys() == override.keys() or not isinstance(space, dict)
    return dotted if replaces else {**space, **dotted}


def _dotted(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        section = isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values())
        if section and "." not in key:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
