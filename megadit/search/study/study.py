"""A study with its base configuration: which cells are run, and the checked configuration of every run.

``load_study`` reads a study file, a name inside ``configs/sweeps`` or a study directory, and refuses what cannot
work before anything runs. ``save_study`` freezes a study in its directory, with the base configuration in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config import RunConfig, replace
from megadit.config.loading.loader import load_layers
from megadit.config.loading.sources import (
    OVERRIDES,
    ConfigLayer,
    configs_dir,
    display,
    find_config,
    override_layer,
    read_layers,
    read_yaml,
)
from megadit.config.schema.reads import check_deferred
from megadit.errors import UserError
from megadit.files.paths import atomic_write, begins_with, check_folder, refuse_unwritable
from megadit.files.yaml_text import dump_yaml
from megadit.nested import flatten, unflatten
from megadit.plugins import load_plugins, plugin_changes, plugin_records, require_imported
from megadit.search.storage.locking import FILES
from megadit.search.study.extend import check_extends
from megadit.search.study.space import Space, build_space
from megadit.search.study.spec import PruningSpec, StudySpec, read_spec

FROZEN = "study.yaml"
_HEADER = "# The study with its base configuration in place, written by megadit"
# What a study writes into its directory beside study.yaml.
_STUDY_FILES = (*FILES.values(), "trials", "workers", "report.html", "report.md")
_SHORT = {"model.width": "w", "train.global_batch": "batch", "train.steps": "steps"}
_VALIDATION_IMAGES = 256  # when the base asks for none and a score needs them


@dataclass(frozen=True)
class Cell:
    """One kind of run: a variant at a value of the scale. ``variant`` is "" and ``scale`` None where there is none.

    Where one run scores several horizons, ``scale`` is the longest of them.
    """

    variant: str
    scale: int | None
    changes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """E.g. ``mup w=128``."""
        if self.scale is None:
            return self.variant or "base"
        scaled = next(f"{short}={self.scale}" for key, short in _SHORT.items() if self.changes.get(key) == self.scale)
        return f"{self.variant} {scaled}".strip()


@dataclass(frozen=True)
class Study:
    """A checked study. ``folder``: its directory. ``base``: with the study's overrides, proxy steps and batch.

    ``cells`` are what is run; ``horizons`` the step counts that each run scores, () where it scores its end alone.
    """

    spec: StudySpec
    base: RunConfig
    folder: Path
    cells: tuple[Cell, ...]
    horizons: tuple[int, ...]
    space: Space

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the variants, the judged one first; ("",) where there are none."""
        return tuple(self.spec.variants) or ("",)

    @property
    def proxy_scale(self) -> int | None:
        """The value of the scale whose optimum is transferred; None in a study without scale."""
        return None if self.spec.scale is None else self.spec.scale.proxy_value

    def config(self, cell: Cell, hps: Mapping[str, Any], seed: int) -> RunConfig:
        """The run of the point ``hps`` in ``cell`` under ``seed``, set so that its metrics hold all scores.

        Raises UserError when the configuration refuses the values.
        """
        changes = {**cell.changes, **hps, "train.seed": seed}
        config = replace(self.base, changes, f"study {self.spec.name}, {cell.label}")
        return replace(config, self._measured(config), f"study {self.spec.name}")

    def trial_folder(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    def first_run(self, cell: Cell) -> RunConfig:
        """A run of ``cell``: at the first point of the space, under the first seed."""
        return self.config(cell, next(self.space.corners()), self.spec.seeds[0])

    def runs(self) -> Iterator[tuple[Cell, RunConfig]]:
        """A run of every kind: each cell at each corner of the space, under the first seed."""
        for cell in self.cells:
            for hps in self.space.corners():
                yield cell, self.config(cell, hps, self.spec.seeds[0])

    def _measured(self, config: RunConfig) -> dict[str, Any]:
        """What makes metrics.jsonl hold every score: windows that end where scores begin and end."""
        train, spec = config.train, self.spec
        points = [*self.horizons, *(score.last for score in spec.scores if score.kind == "train_loss")]
        if points and not self.horizons and train.steps is not None:
            points.append(train.steps)
        if spec.pruning.rule != "none":
            points += [spec.pruning.every, spec.pruning.after]
        changes: dict[str, Any] = {
            "train.log_every": math.gcd(train.log_every, *points),
            "train.tensorboard": "tensorboard" in spec.keep,
        }
        if "checkpoint" not in spec.keep:
            changes["train.checkpoint_every"] = None
        if "samples" not in spec.keep:
            changes["train.sample_every"] = None
        if not any(score.kind == "val_loss" for score in spec.scores):
            return changes | {"train.validate_every": None}
        if train.validation_images == 0:
            changes["train.validation_images"] = _VALIDATION_IMAGES
        return changes | {"train.validate_every": math.gcd(*self.horizons[:-1]) or None}


def load_study(source: str | Path, study_dir: str | Path | None = None, overrides: Sequence[str] = ()) -> Study:
    """The study that ``source`` names: a study file, a name inside configs/sweeps, or a study directory.

    ``overrides`` are ``key=value`` of the study (``workers.count=2``) or of its base configuration
    (``data.path=/data/imagenet``). Only reads. Raises UserError, naming the key and the remedy, for whatever cannot
    work, and when ``study_dir`` (default ``runs/sweeps/<name>``) holds another study.
    """
    file, folder = find_study(source, study_dir)
    values = override_layer(overrides).values
    of_study = {key: value for key, value in values.items() if key in StudySpec.model_fields}
    of_base = {key: value for key, value in values.items() if key not in of_study}
    spec = read_spec(file, of_study)
    base = _load_base(spec, file, of_base)
    horizons = _horizons(spec, base)
    folder = folder or _default_folder(spec)
    study = Study(spec, base, folder, _cells(spec, horizons), horizons, build_space(spec.space))
    _check(study)
    _refuse_foreign(folder)
    frozen = folder / FROZEN
    if not (is_frozen(file) or frozen.is_file()):  # one that has begun goes on, whatever it says
        _check_reads(study, flatten(of_base))
    if frozen.is_file() and (overrides or frozen.resolve() != file.resolve()):
        check_against_frozen(study)
    return study


def import_study_plugins(source: str | Path) -> None:
    """Import the plugins that a study file names; what megadit wrote into a study directory is no reason to.

    Raises UserError.
    """
    file, _ = find_study(source, None)
    if not is_frozen(file):
        named = plugin_records(read_yaml(file).get("plugins") or [])
        load_plugins((record["name"] for record in named), f"plugins in {display(file)}")


def changed_plugins(folder: Path) -> list[str]:
    """A sentence for each plugin that is imported with other sources than those of the study in ``folder``, if any."""
    frozen = folder / FROZEN
    return plugin_changes(plugin_records(read_yaml(frozen).get("plugins") or [])) if frozen.is_file() else []


def check_against_frozen(study: Study) -> None:
    """Whether the study may go on in its directory. Raises UserError when that holds another one."""
    frozen = study.folder / FROZEN
    if frozen.is_file():
        earlier, folder = read_spec(frozen), study.folder
        check_extends(study.spec, study.base, earlier, _load_base(earlier, frozen, {}), folder, bool(study.horizons))


def make_folder(folder: Path) -> None:
    """Make a study's directory. Raises UserError when it cannot be made."""
    check_folder(folder, "--study_dir")
    with refuse_unwritable("--study_dir", folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)


def save_study(study: Study) -> Path:
    """Write ``study.yaml`` into the study's directory: the study with its base in place. It appears whole or not."""
    values = study.spec.model_dump(mode="json")
    base = study.base.model_dump(mode="json")
    values |= {"base": base, "plugins": base["plugins"], "overrides": {}, "proxy": {}}
    text = f"{_HEADER}: what its trials were run with.\n{dump_yaml(values)}"
    target = study.folder / FROZEN
    make_folder(study.folder)
    with refuse_unwritable("--study_dir", target, "choose another folder"), atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def is_frozen(file: Path) -> bool:
    """Whether ``file`` is a study that megadit wrote into a study directory."""
    return begins_with(file, (_HEADER.encode(),))


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError where a study in ``folder`` would replace files that no study wrote."""
    occupied = next((folder / name for name in (FROZEN, *_STUDY_FILES) if (folder / name).exists()), None)
    if occupied is not None and not is_frozen(folder / FROZEN):
        raise UserError(
            f"--study_dir: '{occupied}' was not written by a study and would be replaced; choose another folder"
        )


def find_study(source: str | Path, study_dir: str | Path | None) -> tuple[Path, Path | None]:
    """The study file and the study directory, as far as the arguments say it."""
    path = Path(source).expanduser()
    folder = None if study_dir is None else Path(study_dir).expanduser()
    if path.is_dir():
        if not (path / FROZEN).is_file():
            raise UserError(f"study: '{source}' has no {FROZEN}; name a study directory, or a file of configs/sweeps")
        if folder is not None and folder.resolve() != path.resolve():
            raise UserError(f"--study_dir: '{study_dir}' is not the study directory '{source}' itself; leave it out")
        if not is_frozen(path / FROZEN):
            raise UserError(
                f"study: '{path / FROZEN}' was not written by megadit, so that '{source}' is no study directory; name "
                "the file itself, and what it writes goes to runs/sweeps or --study_dir"
            )
        return path / FROZEN, path
    if path.is_file():
        # A frozen study is known by its header and its database; any other file of the name is a study to make.
        database = any((path.parent / name).is_file() for name in FILES.values())
        inside = path.name == FROZEN and database and is_frozen(path)
        return path, path.parent if inside and folder is None else folder
    shipped = configs_dir() / "sweeps" / path
    for file in (shipped, shipped.with_name(f"{shipped.name}.yaml")):
        if file.is_file():
            return file, folder
    return find_config(source if path.suffix else f"{source}.yaml", "study"), folder


def study_folder(source: str | Path, study_dir: str | Path | None) -> Path:
    """The study directory that the arguments mean, without reading more of a study file than its name."""
    file, folder = find_study(source, study_dir)
    return folder or _default_folder(read_spec(file))


def _default_folder(spec: StudySpec) -> Path:
    return Path("runs") / "sweeps" / spec.name


def existing_study(source: str | Path, study_dir: str | Path | None) -> Study:
    """The study that is there already, whatever overrides it was made with. Raises UserError where there is none."""
    folder = study_folder(source, study_dir)
    if not (folder / FROZEN).is_file():
        raise UserError(f"--study_dir: '{folder}' holds no study yet; start it with launch/sweep.py run")
    return load_study(folder)


def _load_base(spec: StudySpec, file: Path, of_base: Mapping[str, Any]) -> RunConfig:
    """The base with overrides, proxy and the command line's ``of_base`` laid over it, in this order."""
    name = display(file)
    require_imported([plugin.model_dump() for plugin in spec.plugins], name)
    if isinstance(spec.base, str):
        beside = file.parent / Path(spec.base).expanduser()
        layers = read_layers(beside if beside.is_file() else find_config(spec.base, "base"))
    else:
        layers = [ConfigLayer(unflatten(spec.base), f"{name}, base", is_frozen(file))]
    sizes = {"train.steps": spec.proxy.steps, "train.global_batch": spec.proxy.batch}
    proxy = {key: size for key, size in sizes.items() if size is not None}
    # A base whose length is what is scaled needs none of its own.
    scale: dict[str, Any] = {} if spec.scale is None else {spec.scale.key: spec.scale.proxy_value}
    parts: dict[str, Mapping[str, Any]] = {"overrides": spec.overrides, "proxy": proxy, "scale": scale}
    layers += [ConfigLayer(unflatten(changes), f"{name}, {part}") for part, changes in parts.items()]
    for key in flatten(of_base):
        setter = spec.set_by(key)
        if setter is not None:
            raise UserError(f"{key}: is set by {setter} of the study {spec.name}; change it there")
    return load_layers([*layers, ConfigLayer(of_base, OVERRIDES)])


def _horizons(spec: StudySpec, base: RunConfig) -> tuple[int, ...]:
    """The step counts that one run scores: under a constant rate a long run passes through all shorter ones."""
    if spec.scale is None or spec.scale.key != "train.steps" or len(spec.scale.values) < 2:
        return ()
    searched = {*spec.space, *(key for changes in spec.variants.values() for key in changes)}
    passes_all = base.optim.schedule == "constant" and "optim.schedule" not in searched and spec.pruning.rule == "none"
    return tuple(sorted(spec.scale.values)) if passes_all and not spec.has_commands else ()


def _cells(spec: StudySpec, horizons: tuple[int, ...]) -> tuple[Cell, ...]:
    values: Sequence[int | None] = (None,) if spec.scale is None else spec.scale.values
    if horizons:
        values = horizons[-1:]
    return tuple(
        Cell(variant, value, changes if spec.scale is None else {**changes, spec.scale.key: value})
        for variant, changes in (spec.variants or {"": {}}).items()
        for value in values
    )


def _check(study: Study) -> None:
    """What holds over all runs. Raises UserError."""
    spec = study.spec
    first = study.space.dimensions[0]
    if spec.select.rule == "conservative" and not first.numeric:
        raise UserError(
            f"select.rule: conservative takes the smallest {first.key}, whose values have no order; name a numeric key "
            "first in the space, or use best"
        )
    widths: dict[int, str] = {}
    for cell, config in study.runs():
        if config.model.base_width is not None:
            widths.setdefault(config.model.base_width, cell.label)
        _check_scores(study, config)
    if len(widths) > 1:
        listed = " and ".join(f"{width} ({label})" for width, label in widths.items())
        raise UserError(
            f"model.base_width: the runs of study {spec.name} have {listed}; hyperparameters in base units mean the "
            "same only under one base width, so give all runs the same"
        )


def _check_scores(study: Study, config: RunConfig) -> None:
    shortest = min(study.horizons, default=config.train.steps)
    for score in study.spec.scores:
        if score.kind == "train_loss" and shortest is not None and score.last > shortest:
            raise UserError(
                f"scores.{score.name}.last: {score.last} is more than the {shortest} steps of a run; lower it"
            )
        if score.kind == "val_loss" and config.data.val_fraction == 0:
            raise UserError(
                f"scores.{score.name}: needs images that are held out, but data.val_fraction is 0; give a share in "
                "the study's overrides, e.g. data.val_fraction: 0.01"
            )


def _check_reads(study: Study, of_command_line: Iterable[str]) -> None:
    """Whether what the study and the command line (dotted configuration keys) ask for is read in one of its runs.

    Raises:
        UserError: nothing reads a key, with the choice that decides it.
    """
    spec = study.spec
    for key, default in PruningSpec().model_dump().items():
        value = getattr(spec.pruning, key)
        if spec.pruning.rule == "none" and value != default:
            raise UserError(
                f"pruning.{key}: {str(value).lower()} is not read where pruning.rule is none; leave it out, or set "
                "pruning.rule=median"
            )
    if spec.sampler == "grid" and spec.sampler_seed:
        raise UserError(
            f"sampler_seed: {spec.sampler_seed} is not read where sampler is grid, which runs every point; leave it "
            "out, or set sampler=random"
        )
    of_variants = (key for changes in spec.variants.values() for key in changes)
    keys = dict.fromkeys((*spec.space, *spec.overrides, *of_variants, *of_command_line), f"study {spec.name}")
    refusals = []
    for _, run in study.runs():
        decides = {"optim.schedule": run.optim.schedule, "optim.min_lr_ratio": run.optim.min_lr_ratio}
        try:
            check_deferred(decides, keys)  # a study has no DeepSpeed file, which could choose another schedule
        except UserError as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]
