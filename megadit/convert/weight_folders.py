"""Folders that trainers write: which file of them holds the model's weights, or what the folder is instead.

U-ViT's ``500000.ckpt`` holds ``nnet.pth`` and ``nnet_ema.pth`` beside the optimizer's, accelerate's folders
``model.safetensors`` or ``pytorch_model.bin``. Sharded and foreign checkpoints are known by the names of their files.
"""

from __future__ import annotations

import re
from pathlib import Path

from megadit.convert.names import listed
from megadit.errors import UserError

_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Names of files of a training's state that are no weights of a model.
_STATE = re.compile(
    r"(?:^|[_.-])(?:optim\w*|opt|scheduler\w*|lr_scheduler|scaler|sampler|dl_state_dict|rng\w*|random_states\w*|"
    r"training_args|step|custom_checkpoint\w*|metadata|loss\w*|args|config)(?:[_.-]|$)"
)
_AVERAGE = re.compile(r"(?:^|[_.-])(?:ema|avg|averaged?|swa|shadow)(?:[_.-]|$|\d)")
_USUAL = ("model", "pytorch_model", "diffusion_pytorch_model", "nnet", "net")
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


def weights_file(path: Path, choice: str | None) -> tuple[Path, list[str], str | None]:
    """The file of weights in the folder ``path``, what people should know of the choice, and what is left of ``--ema``.

    ``choice``, ``--ema``, may be the name of a file without its ending; else it is for what the file holds.

    Raises:
        UserError: none or several are there, or the folder is a checkpoint of another kind.
    """
    told = folder_instead(path)
    if told is not None:
        raise UserError(f"IN: '{path}' {told}")
    files = {file.stem: file for file in _weight_files(path)}
    if choice is not None and choice in files:
        return files[choice], [f"the weights in {files[choice].name} are taken"], None
    trained = [stem for stem in files if not _AVERAGE.search(stem)] or list(files)
    usual = [stem for stem in _USUAL if stem in trained] or trained
    if not files or (usual is trained and len(trained) > 1):
        held = f"holds {listed([file.name for file in files.values()])}" if files else "holds no file of weights"
        raise UserError(f"IN: '{path}' is a folder that {held}; give the file that holds the model's weights")
    taken = files[usual[0]]
    others = "".join(f"; --ema {stem} takes those in {file.name}" for stem, file in files.items() if file != taken)
    return taken, [f"the weights in {taken.name} are taken{others}"], choice


def folder_instead(path: Path) -> str | None:
    """What a folder is and what to do, where it is a checkpoint that holds no one file of weights; else None."""
    names = {file.name for file in path.iterdir()}
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed.checkpoint (FSDP's shards), whose tensors are cut over its files; "
            f"join them into one file and give that: {_DCP} '{path}' weights.pt"
        )
    if "model_index.json" in names or _is_diffusers(path):
        return "is a folder of diffusers; read it with --from diffusers"
    if "adapter_config.json" in names:
        return (
            "holds an adapter (LoRA or the like), which changes the weights of another model; merge it into its base "
            "model (PEFT: merge_and_unload()) and give what that saves"
        )
    if "checkpoints" in names and "config.yaml" in names:
        return "is a run of megadit; read it with --from megadit"
    if {"index.json", "state.json"} <= names:
        return "is a checkpoint of megadit; read it with --from megadit"
    if any(re.fullmatch(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt", name) for name in names) or any(
        re.fullmatch(r"global_step\d+", name) for name in names
    ):
        universal = "-universal" if "zero" in names else ""
        return f"is a checkpoint of DeepSpeed; read it with --from deepspeed{universal}"
    if "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"mp_rank_\d\d(?:_\d+)?", n) for n in names):
        return (
            "is a checkpoint of Megatron, cut over its ranks and with names of its own; convert it with the tools of "
            "the program that made it"
        )
    return None


def _weight_files(path: Path) -> list[Path]:
    """Files that may hold weights; of two formats of the same, safetensors."""
    files = [
        file
        for file in sorted(path.iterdir())
        if file.name.endswith(_ENDINGS) and file.is_file() and not _STATE.search(file.name)
    ]
    return [
        file for file in files if file.suffix == ".safetensors" or not (path / f"{file.stem}.safetensors").is_file()
    ]


def _is_diffusers(path: Path) -> bool:
    try:
        return b'"_class_name"' in (path / "config.json").read_bytes()[:65536]
    except OSError:
        return False
