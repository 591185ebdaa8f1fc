"""Writing a checkpoint: all ranks their fragments, rank 0 the index; nothing is final before it is on the disk."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.checkpoint.format import (
    WEIGHTS,
    FileRecord,
    Index,
    Position,
    StateSource,
    StoredFragment,
    cannot_write,
    flush_folder,
    refuse_disk_errors,
    write_text,
)
from megadit.checkpoint.fragment_files import write_fragments
from megadit.checkpoint.names import INDEX, LATEST, STATE, checkpoint_root, step_folder, step_folders, step_of
from megadit.config import RunConfig
from megadit.engine.deepspeed.partitions import Fragment, Partitions
from megadit.files.ownership import Ownership, OwnershipLost
from megadit.parallel import ProcessContext


def save_checkpoint(
    run_dir: Path,
    partitions: Partitions,
    config: RunConfig,
    position: Position,
    groups: list[dict[str, Any]],
    context: ProcessContext,
    sources: Sequence[StateSource] = (),
    ownership: Ownership | None = None,
    extra_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``step-XXXXXXXX`` from all ranks, point ``latest`` to it, and drop what is not to be kept.

    Kept are the ``train.keep_last`` newest up to it and the multiples of ``train.keep_every``. ``groups`` is the plain
    table of optimizer groups (name, lr_mult, wd_mult, …) stored for comparison at resume; ``sources`` is the state
    beside weights and moments, ``extra_state`` what else ``state.json`` is to hold. ``ownership`` of the run directory,
    on rank 0: asked before anything is written or removed. Every rank must call this. Returns the checkpoint's folder.

    Raises:
        OwnershipLost: the run directory is another process's by now; nothing is published.
        UserError: the disk is full or not writable; the checkpoint before stays in place.
    """
    root = checkpoint_root(run_dir)
    final = step_folder(root, position.step)
    temporary: Path = context.on_main(lambda: refuse_disk_errors(final, lambda: _prepare(final, ownership)))
    owned = partitions.fragments_to_save()
    file, problem = f"fragments-{context.rank:05d}.safetensors", ""
    records: dict[str, FileRecord] = {}
    fragments: list[StoredFragment] = []
    try:
        if owned:
            records[file], fragments = write_fragments(
                temporary / file, list(_tensors(partitions, sources, owned, file))
            )
    except OSError as error:
        problem = f"rank {context.rank}: {error.strerror or error}"
    reports = context.gather_objects((problem, records, fragments, {f.name: list(f.shape) for f in owned}))

    def publish() -> None:
        problems = [report[0] for report in reports if report[0]]
        if problems:
            shutil.rmtree(temporary, ignore_errors=True)
            raise cannot_write(final, "; ".join(problems))
        index = Index(
            parameters={name: shape for report in reports for name, shape in report[3].items()},
            fragments=[fragment for report in reports for fragment in report[2]],
            files={name: record for report in reports for name, record in report[1].items()},
            plugins=[plugin.model_dump() for plugin in config.plugins],
        )
        state = {
            **asdict(position),
            "adam_step": partitions.adam_step(),
            "loss_scale": partitions.loss_scale_state(),
            "groups": groups,
            "config": config.model_dump(mode="json"),
            **(extra_state or {}),
            "layout": {
                "ranks": context.world_size,
                "zero_stage": partitions.stage,
                "tensor": config.parallel.tensor,
                "pipeline": config.parallel.pipeline,
            },
        }
        refuse_disk_errors(final, lambda: _publish(temporary, final, index, state, config, ownership))

    context.on_main(publish)
    return final


def _prepare(final: Path, ownership: Ownership | None) -> Path:
    """Make the folder to write into, whose name no other process uses, and drop what a killed run left of its own."""
    token = secrets.token_hex(8)
    if ownership is not None:
        ownership.check()
        token = ownership.token
    root = final.parent
    for torn in root.glob(".step-*.tmp"):
        # Of an owner that was only silent, some rank may still be writing.
        if ownership is None or ownership.sure or f".{token}." in torn.name:
            shutil.rmtree(torn, ignore_errors=True)
    temporary = root / f".{final.name}.{token}.tmp"
    temporary.mkdir(parents=True)
    flush_folder(root.parent)
    return temporary


def _tensors(
    partitions: Partitions, sources: Sequence[StateSource], fragments: list[Fragment], file: str
) -> Iterator[tuple[StoredFragment, Tensor]]:
    for f in fragments:
        kinds = {WEIGHTS: f.values, **partitions.moments(f)}
        for source in sources:
            kinds |= source.tensors(f)
        for kind, values in kinds.items():
            yield StoredFragment(kind, f.name, f.start, f.stop, file, f.shard_regions), values


def _publish(
    temporary: Path, final: Path, index: Index, state: dict[str, Any], config: RunConfig, ownership: Ownership | None
) -> None:
    try:
        write_index(temporary, index, state)
        if ownership is not None:
            ownership.check()
        _rename(temporary, final)
    except (OSError, OwnershipLost):
        shutil.rmtree(temporary, ignore_errors=True)  # gives its space back
        raise
    _drop_old(final, config.train.keep_last, config.train.keep_every)


def write_index(folder: Path, index: Index, state: dict[str, Any]) -> None:
    """Write ``state.json`` and ``index.json`` beside the fragment files, and flush the folder."""
    index.files[STATE] = write_text(folder / STATE, json.dumps(state, indent=1))
    write_text(folder / INDEX, index.to_json())
    flush_folder(folder)


def _rename(temporary: Path, final: Path) -> None:
    """Give a complete folder its name, then let ``latest`` say so."""
    replaced = temporary.with_name(f"{temporary.name.removesuffix('.tmp')}.old.tmp")
    if final.exists():  # of a branch abandoned for an earlier step, or a broken one
        os.replace(final, replaced)
    os.replace(temporary, final)
    flush_folder(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")
    flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def set_latest(run_dir: Path, checkpoint: Path) -> None:
    """Let ``latest`` name the checkpoint of its own from which a run resumes.

    So that a run that went back to an earlier step or passed over a broken checkpoint, killed before it saves, resumes
    from the same checkpoint again, and not from the branch that it abandoned.

    Raises:
        UserError: the disk does not take it.
    """
    root = checkpoint_root(run_dir)
    if checkpoint.resolve().parent == root.resolve():
        text = f"{checkpoint.resolve().name}\n"
        pointer = root / LATEST
        if not pointer.is_file() or pointer.read_bytes() != text.encode():
            refuse_disk_errors(pointer, lambda: write_text(pointer, text))


def _drop_old(newest: Path, keep_last: int, keep_every: int | None) -> None:
    """Keep ``newest``, those just before it and the multiples; later ones belong to an abandoned branch."""
    present = step_folders(newest.parent)
    up_to = [path for path in present if step_of(path) <= step_of(newest)]
    keep = set(up_to[-keep_last:])
    if keep_every is not None:
        keep |= {path for path in up_to if step_of(path) % keep_every == 0}
    for path in present:
        if path not in keep:
            # Its index goes first: a removal that is cut short must not look like a checkpoint.
            (path / INDEX).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
