"""What a folder is, recognized by the names in it: checkpoints of other programs, which are no one file of weights.

Readers ask here once a folder is not what they wanted. Nothing but names is looked at, and the head of a config.json.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megadit.files.file_kind import instead, kind_of_file

_WEIGHTS = ("torch", "old-torch", "safetensors")  # ids of files
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
_DEEPSPEED = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt|global_step\d+")
_CONVERT = "read it with tools/convert_checkpoint.py --from"


def folder_instead(path: Path) -> str | None:
    """What a folder is and what to do, where it is a checkpoint that holds no one file of weights; else None."""
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:
        return None
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed.checkpoint (FSDP's shards), whose tensors are cut over its files; "
            f"join them into one file and give that: {_DCP} '{path}' weights.pt"
        )
    if "model_index.json" in names or _is_diffusers(path):
        return f"is a folder of diffusers; {_CONVERT} diffusers"
    if "snapshots" in names:
        return snapshot_of(path)
    if "adapter_config.json" in names:
        return (
            "holds an adapter (LoRA or the like), which changes the weights of another model; merge it into its base "
            "model (PEFT: merge_and_unload()) and give what that saves"
        )
    if "checkpoints" in names and "config.yaml" in names:
        return f"is a run of megadit; {_CONVERT} megadit"
    if {"index.json", "state.json"} <= names:
        return f"is a checkpoint of megadit; {_CONVERT} megadit"
    if any(_DEEPSPEED.fullmatch(name) for name in names):
        universal = "-universal" if "zero" in names or any(path.glob("global_step*/zero")) else ""
        return f"is a checkpoint of DeepSpeed; {_CONVERT} deepspeed{universal}"
    if "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"mp_rank_\d\d(?:_\d+)?", n) for n in names):
        return (
            "is a checkpoint of Megatron, cut over its ranks and with names of its own; convert it with the tools of "
            "the program that made it"
        )
    return None


def _folder_of_weights(path: Path) -> str | None:
    """That a folder holds weights and what to do, by their endings; None if it holds none, or cannot be listed."""
    try:
        held = sorted(file.name for file in path.iterdir() if file.name.endswith(_ENDINGS))
    except OSError:
        return None
    made = "tools/convert_checkpoint.py makes a run of the weights of other programs"
    return f"holds weights ({held[0]}); {made}" if held else None


def run_instead(path: Path) -> str | None:
    """What lies at ``path`` where a run or a checkpoint of megadit is wanted, and what to do; None if not known."""
    kind = kind_of_file(path)
    if kind is not None and kind.id == "folder":
        folder_kind = folder_instead(path) or _folder_of_weights(path)
        return None if folder_kind is None else f"it {folder_kind}"
    if kind is not None and kind.id in _WEIGHTS:
        return f"it is {kind.name}; tools/convert_checkpoint.py makes a run of the weights of other programs"
    return instead(kind)


def _is_diffusers(path: Path) -> bool:
    try:
        return b'"_class_name"' in (path / "config.json").read_bytes()[:65536]
    except OSError:
        return False


def snapshot_of(folder: Path) -> str | None:
    """The remedy where ``folder`` is a model's folder in the cache (``models--OWNER--NAME``); None where it is not.

    The snapshot is that of ``refs/main``, else the last one by name.
    """
    if not (folder / "snapshots").is_dir():
        return None
    snapshots = sorted(inner for inner in (folder / "snapshots").iterdir() if inner.is_dir())
    if not snapshots:
        return "is a cache of the Hugging Face hub without a snapshot; download the model again"
    try:
        with open(folder / "refs" / "main", encoding="utf-8") as file:
            main = file.read(256).strip()
    except (OSError, ValueError):
        main = ""
    snapshot = next((inner for inner in snapshots if inner.name == main), snapshots[-1])
    return f"is a cache of the Hugging Face hub; give its snapshot '{snapshot}'"


def broken_link(path: Path) -> str | None:
    """What is wrong where ``path`` is a link to nothing, as in a snapshot copied alone; None where it is not."""
    if not path.is_symlink() or path.exists():
        return None
    return f"is a link to '{os.readlink(path)}', which is missing; copy with what links point to (cp -L)"
