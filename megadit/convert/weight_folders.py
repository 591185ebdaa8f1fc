"""Folders that trainers write: which file of them holds the model's weights.

U-ViT's ``500000.ckpt`` holds ``nnet.pth`` and ``nnet_ema.pth`` beside the optimizer's, accelerate's folders
``model.safetensors`` or ``pytorch_model.bin``.
"""

from __future__ import annotations

import re
from pathlib import Path

from megadit.errors import UserError
from megadit.files.folder_kind import folder_instead
from megadit.models.conversion.key_maps import listed

_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Names of files of a training's state that are no weights of a model.
_STATE = re.compile(
    r"(?:^|[_.-])(?:optim\w*|opt|scheduler\w*|lr_scheduler|scaler|sampler|dl_state_dict|rng\w*|random_states\w*|"
    r"training_args|step|custom_checkpoint\w*|metadata|loss\w*|args|config)(?:[_.-]|$)"
)
_AVERAGE = re.compile(r"(?:^|[_.-])(?:ema|avg|averaged?|swa|shadow)(?:[_.-]|$|\d)")
_USUAL = ("model", "pytorch_model", "diffusion_pytorch_model", "nnet", "net")


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
