"""Restoring: a checkpoint's tensors into a training engine of any layout, or into a plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from megadit.checkpoint.compatibility import check_shapes
from megadit.checkpoint.format import WEIGHTS, BrokenCheckpoint, StateSource
from megadit.checkpoint.fragment_reader import FragmentReader
from megadit.checkpoint.read import StoredCheckpoint
from megadit.config.schema.run import ONLINE
from megadit.engine.deepspeed.partitions import MOMENTS, Fragment, Partitions
from megadit.engine.ema import EMA_PREFIX
from megadit.errors import UserError
from megadit.finite import all_finite, describe_nonfinite
from megadit.models.repa import PREFIX
from megadit.parallel import ProcessContext


def restore_training_state(
    checkpoint: StoredCheckpoint, partitions: Partitions, sources: Sequence[StateSource], context: ProcessContext
) -> list[str]:
    """Fill this rank's master weights, moments and ``sources``, and the model's working weights from them.

    A source's kind that is not stored starts from the stored weights. All ranks must call this; it succeeds on all or
    fails on all, and then the fragments hold nothing of use. Returns what people should know.

    Raises:
        BrokenCheckpoint: on every rank, if some rank found its part torn, corrupt, incomplete or not finite.
        UserError: it holds weights alone.
    """
    if not set(MOMENTS) <= set(checkpoint.kinds) and checkpoint.parameters:
        raise UserError(
            f"checkpoint {checkpoint.path}: holds weights without optimizer state; start a new run from them with "
            f"train.init_from={checkpoint.path} and another --run_dir"
        )
    missing_kinds: set[str] = set()

    def fill(reader: FragmentReader, f: Fragment) -> None:
        for kind, values in {WEIGHTS: f.values, **partitions.moments(f)}.items():
            reader.read_into(values, kind, f.name, f.start, f.shard_regions)
            _check_finite(checkpoint, kind, f.name, values)
        for source in sources:
            for kind, values in source.tensors(f).items():
                if kind in checkpoint.kinds:
                    reader.read_into(values, kind, f.name, f.start, f.shard_regions)
                else:
                    missing_kinds.add(kind)
                    values.copy_(f.values)

    _fill_fragments(checkpoint, partitions, context, fill)
    partitions.set_adam_step(int(checkpoint.state["adam_step"]))
    partitions.load_loss_scale_state(checkpoint.state["loss_scale"])
    position = checkpoint.position
    partitions.set_counters(position.step, position.samples_seen, position.skipped_steps)
    partitions.publish_masters()
    notes = [f"{kind} is not in the checkpoint and starts from its weights" for kind in sorted(missing_kinds)]
    for fragment in partitions.fragments()[:1]:
        used = {kind for source in sources for kind in source.tensors(fragment)}
        dropped = [EMA_PREFIX + name for name in checkpoint.averages if EMA_PREFIX + name not in used]
        notes += [f"{kind} of the checkpoint is no longer configured and is dropped" for kind in dropped]
    return notes


def restore_weights(
    checkpoint: StoredCheckpoint,
    partitions: Partitions,
    sources: Sequence[StateSource],
    context: ProcessContext,
    weights: str,
) -> None:
    """Fill the masters alone, with the online weights or an average; ``sources`` begin at them. All ranks call.

    A projector of REPA that is not stored keeps the values that it has.

    Raises:
        BrokenCheckpoint: on every rank, if some rank found its part torn, corrupt, incomplete or not finite.
    """
    kind = checkpoint.kind_of(weights)

    def fill(reader: FragmentReader, f: Fragment) -> None:
        if f.name in checkpoint.parameters:
            reader.read_into(f.values, kind, f.name, f.start, f.shard_regions)
            _check_finite(checkpoint, kind, f.name, f.values)
        for source in sources:
            for values in source.tensors(f).values():
                values.copy_(f.values)

    _fill_fragments(checkpoint, partitions, context, fill, optional=PREFIX)
    partitions.publish_masters()


def load_weights(checkpoint: StoredCheckpoint, model: nn.Module, weights: str = ONLINE) -> None:
    """Fill a plain (unsharded, float32) model's parameters with the stored masters, or with an average of them.

    Raises:
        UserError: another model's shapes, no such average, or a broken file.
    """
    kind = checkpoint.kind_of(weights)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_shapes(checkpoint, {name: list(p.shape) for name, p in parameters.items()})
    with checkpoint.reader() as reader:
        for name, parameter in parameters.items():
            flat = parameter.data.new_empty(parameter.numel())
            reader.read_into(flat, kind, name)
            _check_finite(checkpoint, kind, name, flat)
            parameter.data.copy_(flat.view_as(parameter))


def _fill_fragments(
    checkpoint: StoredCheckpoint,
    partitions: Partitions,
    context: ProcessContext,
    fill: Callable[[FragmentReader, Fragment], None],
    *,
    optional: str | None = None,
) -> None:
    """``fill`` every fragment; parameters whose names begin with ``optional`` need not be stored."""
    problem = ""
    try:
        with checkpoint.reader() as reader:
            for fragment in partitions.fragments():
                may_be_missing = optional is not None and fragment.name.startswith(optional)
                shape = checkpoint.parameters.get(fragment.name)
                if shape != list(fragment.shape) and not (may_be_missing and shape is None):
                    check_shapes(checkpoint, {**checkpoint.parameters, fragment.name: list(fragment.shape)})
                fill(reader, fragment)
    except BrokenCheckpoint as error:
        problem = str(error)
    _raise_on_all_ranks(context, problem)


def _check_finite(checkpoint: StoredCheckpoint, kind: str, name: str, values: Tensor) -> None:
    """Raise BrokenCheckpoint for values with which everything that is computed is NaN, whoever wrote them."""
    problem = "" if all_finite(values) else describe_nonfinite([(name, values)])
    if problem:
        raise BrokenCheckpoint(
            f"checkpoint {checkpoint.path}: of its {kind}, {problem}, from which nothing goes on; use an earlier one"
        )


def open_on_all_ranks(path: Path, context: ProcessContext) -> StoredCheckpoint:
    """Open a checkpoint on all ranks, or on none.

    Raises:
        BrokenCheckpoint: on every rank, if some rank cannot read it.
    """
    checkpoint, problem = None, ""
    try:
        checkpoint = StoredCheckpoint(path)
    except BrokenCheckpoint as error:
        problem = str(error)
    _raise_on_all_ranks(context, problem)
    assert checkpoint is not None
    return checkpoint


def _raise_on_all_ranks(context: ProcessContext, problem: str) -> None:
    """Raise BrokenCheckpoint on every rank where some rank gives a problem: the first of them."""
    problems = [problem for problem in context.gather_objects(problem) if problem]
    if problems:
        raise BrokenCheckpoint(problems[0], everywhere=True)
