"""Reading a checkpoint: what it says of itself, and its tensors into any layout."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from megadit.checkpoint.format import (
    FLOAT_BYTES,
    WEIGHTS,
    BrokenCheckpoint,
    Index,
    Position,
    StateSource,
    StoredFragment,
    check_state,
    told,
)
from megadit.checkpoint.fragment_reader import FragmentReader
from megadit.checkpoint.names import STATE
from megadit.config import RunConfig
from megadit.config.schema.run import ONLINE
from megadit.data.windows import merge_windows
from megadit.engine.deepspeed.partitions import MOMENTS, Fragment, Partitions
from megadit.engine.ema import KIND as EMA_KIND
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.finite import all_finite, describe_nonfinite
from megadit.models.repa import PREFIX, without_projector
from megadit.nested import flatten
from megadit.parallel import ProcessContext
from megadit.plugins import require
from megadit.slices import PendingSpans, contiguous_spans

# Any layout trains the same model.
_LAYOUT_KEYS = (
    *(f"parallel.{key}" for key in ("tensor", "pipeline", "sequence", "zero_stage")),
    "train.micro_batch",
)
# Of the model section, what leaves the weights' meaning the same: how they are computed with, and how they began.
_NOT_THE_MODEL = {"attention_precision", "norm_precision", "init", "adaln_init"}


class StoredCheckpoint:
    """An opened checkpoint: its index, its state and its config. Opening it checks the sizes of all of its files.

    Raises:
        BrokenCheckpoint: torn, changed or incomplete, as far as can be seen without reading the tensors.
        UserError: of a newer format, or made with plugins that are not imported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        require(self.index.plugins, f"checkpoint {path}")
        self._check_sizes()
        try:
            text = (path / STATE).read_bytes()
            record = self.index.files.get(STATE)
            if record is not None and zlib.crc32(text) != record.crc32:
                raise ValueError("its checksum is wrong")
            self.state: dict[str, Any] = json.loads(text)
            check_state(self.state)
            self.config = _completed(self.state["config"])
            self.position = Position(*(int(self.state[key]) for key in ("step", "samples_seen", "skipped_steps")))
            # Before samples could be left out the numbers were those of the samples seen.
            samples = self.state.get("samples") or {"next": self.position.samples_seen, "left_out": []}
            self.next_sample = int(samples["next"])
            self.left_out = merge_windows((int(first), int(stop)) for first, stop in samples["left_out"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenCheckpoint(
                f"checkpoint {path}: {STATE} cannot be read ({told(error, path / STATE)}); use an earlier one"
            ) from error

    def _check_sizes(self) -> None:
        """The sizes that the index says; version 1 says none, but its files hold at least all of its weights."""
        for name, record in self.index.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes:
                what = "is missing" if size is None else f"has {size} bytes of {record.bytes}"
                other = file_instead(file, "safetensors", "json")
                what += f" ({other})" if other is not None else ""
                raise BrokenCheckpoint(f"checkpoint {self.path}: {name} {what}; use an earlier one")
        needed = sum(math.prod(shape) for shape in self.parameters.values()) * FLOAT_BYTES
        files = [self.path / name for name in dict.fromkeys(fragment.file for fragment in self.index.fragments)]
        stored = sum(file.stat().st_size for file in files if file.is_file())
        if stored < needed:
            raise BrokenCheckpoint(
                f"checkpoint {self.path}: its files have {stored} bytes, its weights {needed}; use an earlier one"
            )

    @property
    def parameters(self) -> dict[str, list[int]]:
        """Global shape of every parameter."""
        return self.index.parameters

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of the parameters: weights, exp_avg, exp_avg_sq, ema/NAME, …"""
        return tuple(dict.fromkeys(fragment.kind for fragment in self.index.fragments))

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the stored moving averages."""
        return tuple(kind.removeprefix(EMA_KIND) for kind in self.kinds if kind.startswith(EMA_KIND))

    def reader(self) -> FragmentReader:
        """Opens the tensors; to be used in a ``with``."""
        index = self.index
        return FragmentReader(self.path, index.parameters, index.fragments, index.files, index.block)

    def check_same_model(self, config: RunConfig) -> None:
        """Refuse a checkpoint of another model: what differs is named.

        Raises:
            UserError: naming the differing model keys, or train.seed or train.global_batch.
        """
        here, there = config.model_dump(mode="json"), self.config
        keys = sorted((set(here["model"]) | set(there["model"])) - _NOT_THE_MODEL)
        if here["model"]["parametrization"] == there["model"].get("parametrization") == "sp":
            keys.remove("base_width")  # which nothing reads there
        different = [k for k in keys if here["model"].get(k) != there["model"].get(k)]
        if different:
            shown = ", ".join(f"model.{k} {there['model'].get(k)} → {here['model'].get(k)}" for k in different[:4])
            raise UserError(
                f"checkpoint {self.path}: is of another model ({shown}); {self._other_model_remedy(config)}"
            )
        for key in ("seed", "global_batch"):
            if here["train"][key] != there["train"][key]:
                raise UserError(
                    f"train.{key}: {here['train'][key]} differs from {there['train'][key]} of checkpoint {self.path}; "
                    "a resumed run keeps it, since the order of images depends on it; train.init_from starts a new run "
                    "from these weights"
                )

    def _other_model_remedy(self, config: RunConfig) -> str:
        if shape_problem(self.parameters, shapes_of(config)):
            return (
                "muP transfers hyperparameters, not weights: train the larger model from its own initialization (leave "
                "--resume out and give another --run_dir), or resume with the checkpoint's own config"
            )
        return (
            "resume with its own config, or start a new run from its weights alone with train.init_from="
            f"{self.path} and another --run_dir"
        )

    def check_shapes(self, shapes: dict[str, list[int]]) -> None:
        """Refuse another model's parameters.

        Raises:
            UserError: naming a parameter that is missing, is too many or has another shape.
        """
        self._refuse_other_shapes(self.parameters, shapes)

    def _refuse_other_shapes(self, stored: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> None:
        problem = shape_problem(stored, needed)
        if problem:
            raise UserError(f"checkpoint {self.path}: {problem}; give a checkpoint of a model of the same shape")

    def check_start(self, shapes: dict[str, list[int]]) -> str | None:
        """``check_shapes`` for a new run, which may have REPA's projector where this has none, or the other way.

        Returns what is to be told of the projector. Raises UserError as ``check_shapes`` does.
        """
        stored, needed = (any(name.startswith(PREFIX) for name in names) for names in (self.parameters, shapes))
        if stored == needed:
            self.check_shapes(shapes)
            return None
        self._refuse_other_shapes(_without_projector(self.parameters), _without_projector(shapes))
        if needed:
            return "the projector of REPA is not in the checkpoint and starts afresh"
        return "the projector of REPA in the checkpoint is left out, since model.repa is not set"

    def changes(self, config: RunConfig) -> list[str]:
        """Every key whose value in ``config`` is not the stored one, as ``key old → new``; layout keys left out."""
        return differences(self.config, config.model_dump(mode="json"))

    def restore(self, partitions: Partitions, sources: Sequence[StateSource], context: ProcessContext) -> list[str]:
        """Fill this rank's master weights, moments and ``sources``, and the model's working weights from them.

        A source's kind that is not stored starts from the stored weights. All ranks must call this; it succeeds on
        all or fails on all, and then the fragments hold nothing of use. Returns what people should know.

        Raises:
            BrokenCheckpoint: on every rank, if some rank found its part torn, corrupt, incomplete or not finite.
            UserError: it holds weights alone.
        """
        if not set(MOMENTS) <= set(self.kinds) and self.parameters:
            raise UserError(
                f"checkpoint {self.path}: holds weights without optimizer state; start a new run from them with "
                f"train.init_from={self.path} and another --run_dir"
            )
        lacking: set[str] = set()

        def fill(reader: FragmentReader, f: Fragment) -> None:
            for kind, values in {WEIGHTS: f.values, **partitions.moments(f)}.items():
                reader.read_into(values, kind, f.name, f.start, f.shard_regions)
                self._check_finite(kind, f.name, values)
            for source in sources:
                for kind, values in source.tensors(f).items():
                    if kind in self.kinds:
                        reader.read_into(values, kind, f.name, f.start, f.shard_regions)
                    else:
                        lacking.add(kind)
                        values.copy_(f.values)

        self._fill(partitions, context, fill)
        partitions.set_adam_step(int(self.state["adam_step"]))
        partitions.load_loss_scale_state(self.state["loss_scale"])
        position = self.position
        partitions.set_counters(position.step, position.samples_seen, position.skipped_steps)
        partitions.publish_masters()
        return self._notes(partitions, sources, lacking)

    def start_from(
        self, partitions: Partitions, sources: Sequence[StateSource], context: ProcessContext, weights: str
    ) -> None:
        """Fill the masters alone, with the online weights or an average; ``sources`` begin at them. All ranks call.

        A projector of REPA that is not stored keeps the values that it has.

        Raises:
            BrokenCheckpoint: on every rank, if some rank found its part torn, corrupt, incomplete or not finite.
        """
        stored = self.kind_of(weights)

        def fill(reader: FragmentReader, f: Fragment) -> None:
            if f.name in self.parameters:
                reader.read_into(f.values, stored, f.name, f.start, f.shard_regions)
                self._check_finite(stored, f.name, f.values)
            for source in sources:
                for values in source.tensors(f).values():
                    values.copy_(f.values)

        self._fill(partitions, context, fill, lacking=PREFIX)
        partitions.publish_masters()

    def _fill(
        self,
        partitions: Partitions,
        context: ProcessContext,
        fill: Callable[[FragmentReader, Fragment], None],
        *,
        lacking: str | None = None,
    ) -> None:
        """``fill`` every fragment; parameters whose names begin with ``lacking`` need not be stored."""
        problem = ""
        try:
            with self.reader() as reader:
                for fragment in partitions.fragments():
                    may_lack = lacking is not None and fragment.name.startswith(lacking)
                    shape = self.parameters.get(fragment.name)
                    if shape != list(fragment.shape) and not (may_lack and shape is None):
                        self.check_shapes({**self.parameters, fragment.name: list(fragment.shape)})
                    fill(reader, fragment)
        except BrokenCheckpoint as error:
            problem = str(error)
        raise_on_all_ranks(context, problem)

    def _notes(self, partitions: Partitions, sources: Sequence[StateSource], lacking: set[str]) -> list[str]:
        notes = [f"{kind} is not in the checkpoint and starts from its weights" for kind in sorted(lacking)]
        for fragment in partitions.fragments()[:1]:
            used = {kind for source in sources for kind in source.tensors(fragment)}
            dropped = [EMA_KIND + name for name in self.averages if EMA_KIND + name not in used]
            notes += [f"{kind} of the checkpoint is no longer configured and is dropped" for kind in dropped]
        return notes

    def kind_of(self, weights: str) -> str:
        """The kind of the online weights or of a moving average.

        Raises:
            UserError: there is no such average; those that there are are named.
        """
        if weights not in (ONLINE, *self.averages):
            raise UserError(
                f"weights '{weights}': checkpoint {self.path} holds {', '.join((ONLINE, *self.averages))}; "
                "choose one of these"
            )
        return WEIGHTS if weights == ONLINE else EMA_KIND + weights

    def load_weights(self, model: nn.Module, weights: str = ONLINE) -> None:
        """Fill a plain (whole, float32) model's parameters with the stored masters, or with an average of them.

        Raises:
            UserError: another model's shapes, no such average, or a broken file.
        """
        kind = self.kind_of(weights)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.check_shapes({name: list(p.shape) for name, p in parameters.items()})
        with self.reader() as reader:
            for name, parameter in parameters.items():
                flat = parameter.data.new_empty(parameter.numel())
                reader.read_into(flat, kind, name)
                self._check_finite(kind, name, flat)
                parameter.data.copy_(flat.view_as(parameter))

    def _check_finite(self, kind: str, name: str, values: Tensor) -> None:
        """Raise BrokenCheckpoint for values with which everything that is computed is NaN, whoever wrote them."""
        problem = "" if all_finite(values) else describe_nonfinite([(name, values)])
        if problem:
            raise BrokenCheckpoint(
                f"checkpoint {self.path}: of its {kind}, {problem}, from which nothing goes on; use an earlier one"
            )

    def verify(self) -> list[str]:
        """Read everything and tell what is not as it was written; of version 1 only what its sizes betray."""
        problems = []
        with self.reader() as reader:
            for fragment in self.index.fragments:
                try:
                    reader.check(fragment)
                except BrokenCheckpoint as error:
                    problems.append(str(error))
        return list(dict.fromkeys(problems + self._gaps()))

    def _gaps(self) -> list[str]:
        stored: dict[tuple[str, str], list[StoredFragment]] = {}
        for fragment in self.index.fragments:
            stored.setdefault((fragment.kind, fragment.name), []).append(fragment)
        found = []
        for kind in self.kinds:
            for name, shape in self.parameters.items():
                wanted = PendingSpans(contiguous_spans(shape, None, 0, math.prod(shape)))
                for fragment in stored.get((kind, name), ()):
                    wanted.take(contiguous_spans(shape, fragment.shard_regions, fragment.start, fragment.stop))
                if wanted.left:
                    found.append(f"checkpoint {self.path}: {wanted.left} elements of {kind} of '{name}' are missing")
        return found


def open_on_all_ranks(path: Path, context: ProcessContext) -> StoredCheckpoint:
    """Open a checkpoint on all ranks, or on none.

    Raises:
        BrokenCheckpoint: on every rank, if some rank cannot read it.
    """
    stored, problem = None, ""
    try:
        stored = StoredCheckpoint(path)
    except BrokenCheckpoint as error:
        problem = str(error)
    raise_on_all_ranks(context, problem)
    assert stored is not None
    return stored


def raise_on_all_ranks(context: ProcessContext, problem: str) -> None:
    """Let what one rank found be every rank's.

    Raises:
        BrokenCheckpoint: some rank gave a problem; the first of them.
    """
    problems = [found for found in context.gather_objects(problem) if found]
    if problems:
        raise BrokenCheckpoint(problems[0], everywhere=True)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Keys of two run configs whose values differ, as ``key old → new``; layout keys left out."""
    return [f"{key} {old} → {new}" for key, (old, new) in changed_values(before, after).items()]


def changed_values(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The (old, new) values of keys of two run configs that differ; layout keys left out."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in new if key in old and key not in _LAYOUT_KEYS]
    return {key: (old[key], new[key]) for key in keys if old[key] != new[key]}


def shape_problem(stored: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> str | None:
    """The first parameter, by name, that only one side has or whose shapes differ, as a phrase of a sentence."""
    for name in sorted({*needed, *stored}):
        there, here = stored.get(name), needed.get(name)
        if there is None:
            return f"has no parameter '{name}', which the model needs"
        if here is None:
            return f"has a parameter '{name}', which the model does not know"
        if list(there) != list(here):
            return f"parameter '{name}' has shape {list(there)}, the model needs {list(here)}"
    return None


def _without_projector(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    return without_projector(shapes)


def shapes_of(config: RunConfig) -> dict[str, list[int]]:
    """Global shape of every trained parameter of a configuration's model."""
    from megadit.models import build_model

    model = build_model(config.model, device="meta")
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of keys that are younger than it; as it is where it is no longer valid."""
    try:
        return RunConfig.model_validate_json(json.dumps(stored)).model_dump(mode="json")
    except ValidationError:
        return stored
