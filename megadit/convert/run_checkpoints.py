"""megadit's own checkpoints as a source and as a target of conversions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megadit.checkpoint.find import open_checkpoint
from megadit.checkpoint.format import WEIGHTS, Position
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.write import save_checkpoint
from megadit.conditioning import Conditioning
from megadit.config import RunConfig, save_config
from megadit.config.family import family_spec
from megadit.config.schema.run import ONLINE
from megadit.convert.contents import Contents, Part, group_facts
from megadit.convert.deferred import deferred, loaded
from megadit.data.conditions import NULL_TEXT_FILE, load_conditions, save_conditions
from megadit.diffusion.sampling.classes import CLASSES_FILE, read_classes
from megadit.engine.deepspeed.partitions import MOMENTS, Fragment, Partitions
from megadit.errors import UserError, say
from megadit.extensions import FAMILIES
from megadit.parallel import ProcessContext
from megadit.plugins import plugin_changes

_TABLE_KEYS = ("name", "lr_mult", "wd_mult", "eps_mult")


def read_run(path: Path, ema: str | None = None) -> Contents:
    """A run's latest checkpoint, or the one at ``path``; with ``ema`` that average takes the place of the weights.

    Raises:
        UserError: no checkpoint is there, it is broken, or it has no such average.
    """
    opened = open_checkpoint(path, str(path), "IN")
    if opened is None:
        raise UserError(f"IN: '{path}' has no checkpoint yet; give a run that has one")
    stored = opened.stored
    source = stored.kind_of(ema or ONLINE)

    def read(kind: str, name: str) -> Sequence[Part]:
        def load() -> Tensor:
            flat = torch.empty(math.prod(stored.parameters[name]))
            with stored.reader() as reader:
                reader.read_into(flat, source if kind == WEIGHTS else kind, name)
            return flat

        return [(0, deferred([math.prod(stored.parameters[name])], torch.float32, load))]

    contents = Contents(
        f"megadit checkpoint '{stored.path}'",
        {name: tuple(shape) for name, shape in stored.parameters.items()},
        (WEIGHTS, *(kind for kind in MOMENTS if kind in stored.kinds)),
        read,
        stored.position,
        int(stored.state["adam_step"]),
        dict(stored.state["loss_scale"]),
        config=_config(stored),
        extras=_extras(stored),
        classes=tuple(read_classes(stored.path.parent.parent)),
    )
    for change in plugin_changes(stored.index.plugins):
        say(f"warning: {change}")
    if ema is not None:
        return contents.weights_only(f"these are the average {ema}")
    if not stored.averages:
        return contents
    note = f"the averages {', '.join(stored.averages)} are left out; --ema takes one as the weights"
    return replace(contents, notes=(note,))


def _config(stored: StoredCheckpoint) -> RunConfig | None:
    from pydantic import ValidationError

    try:
        return RunConfig.model_validate_json(json.dumps(stored.config))
    except ValidationError:  # of another version of megadit; --config can say what it was
        return None


def _extras(stored: StoredCheckpoint) -> dict[str, Tensor]:
    """The model's own null caption, which the run's directory holds beside its checkpoints."""
    family, file = stored.config["model"]["family"], stored.path.parent.parent / NULL_TEXT_FILE
    name = family_spec(family).null_caption if family in FAMILIES else ""
    text = load_conditions(file)[0].text if name and file.is_file() else None
    return {} if text is None else {name: text[0]}


class _Imported:
    """Contents of another format with the face of ``Partitions`` that ``save_checkpoint`` looks at."""

    replicated, stage = True, 0

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def fragments(self) -> list[Fragment]:
        """One per stored part of a parameter's weights; the values stay in the file until they are written."""
        return [
            Fragment(name, tuple(shape), start, start + values.numel(), values, values, 0)
            for name, shape in self._contents.shapes.items()
            for start, values in self._contents.parts(WEIGHTS, name)
        ]

    def fragments_to_save(self) -> list[Fragment]:
        """All fragments: there is one rank."""
        return self.fragments()

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Adam's moments of the same elements, which every format cuts as it cuts the weights."""
        if not self._contents.has_moments:
            return {}
        return {kind: self._part(kind, fragment) for kind in MOMENTS}

    def _part(self, kind: str, fragment: Fragment) -> Tensor:
        parts = dict(self._contents.parts(kind, fragment.name))
        values = parts.get(fragment.start)
        if values is None or values.numel() != fragment.stop - fragment.start:
            raise UserError(
                f"{self._contents.description}: {kind} of '{fragment.name}' is not cut as its weights are; copy the "
                "whole checkpoint, or use an earlier one"
            )
        return values

    def adam_step(self) -> int:
        """Number of updates that the moments have seen."""
        return self._contents.adam_step

    def loss_scale_state(self) -> dict[str, Any]:
        """The dynamic loss scaler's numbers."""
        return self._contents.loss_scale


def write_run(contents: Contents, target: Path) -> list[str]:
    """Make ``target`` a run directory with one checkpoint, from which --resume and train.init_from go on.

    Learning rates and weight decay are the config's: what the other program had is reported. Returns what people should
    know.

    Raises:
        UserError: no config is given.
    """
    config = contents.config
    if config is None:
        raise UserError("--config: is needed to write a megadit checkpoint; give the YAML file of the model's run")
    position = contents.position
    samples = position.step * config.train.global_batch
    notes = []
    if position.samples_seen not in (0, samples):
        notes.append(
            f"data goes on at image {samples}, which is step {position.step} of train.global_batch "
            f"{config.train.global_batch}; the source had drawn {position.samples_seen}"
        )
    position = Position(position.step, samples, position.skipped_steps)
    facts = group_facts(contents.groups)
    if facts:
        notes.append(
            "learning rates and weight decay come from the config, not from the source's optimizer groups "
            f"({'; '.join(facts)})"
        )
    target.mkdir()
    save_config(config, target / "config.yaml")
    caption = contents.extras.get(family_spec(config.model.family).null_caption)
    if caption is not None:
        save_conditions(target / NULL_TEXT_FILE, Conditioning(text=loaded(caption)[None]))
    if contents.classes:
        (target / CLASSES_FILE).write_text(json.dumps(contents.classes), encoding="utf-8")
    alone = ProcessContext(0, 1, 0, torch.device("cpu"))
    save_checkpoint(target, cast(Partitions, _Imported(contents)), config, position, _group_table(config), alone)
    if not contents.has_moments:
        notes.append("start from it with train.init_from=OUT; --resume needs optimizer state")
    elif position.step:
        notes.append(f"go on from it with --run_dir OUT, or --resume OUT; the schedule goes on at step {position.step}")
    return notes


def _group_table(config: RunConfig) -> list[dict[str, Any]]:
    """The table of optimizer groups that the config's run has."""
    from megadit.models import build_model
    from megadit.mup.groups import param_groups

    groups = param_groups(build_model(config.model, device="meta"), config.optim)
    return [{key: group[key] for key in _TABLE_KEYS} for group in groups]
