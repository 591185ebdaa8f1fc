"""A folder of computed features, one small file per picture, found by the picture's own content.

So they hold whatever the set, the order, mirroring or cropping that led to the picture, and nothing needs to be
computed before a run: what one run computes, the next one reads. For millions of pictures store features in shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megadit.data.features.encoder import FeatureEncoder
from megadit.errors import UserError
from megadit.files.paths import check_folder, save_tensors


class CachedEncoder(FeatureEncoder):
    """Another encoder's features, rounded to float16 and kept in ``folder``; a second run reads the same numbers.

    Any number of processes may share the folder. Raises UserError if it cannot be written.
    """

    def __init__(self, encoder: FeatureEncoder, folder: Path) -> None:
        self.encoder, self.identity, self.dim = encoder, encoder.identity, encoder.dim
        self.folder = folder / encoder.identity
        check_folder(self.folder, "data.features.cache")
        self._refuse_errors(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As ``FeatureEncoder.encode``; only pictures that are not in the folder go through the network."""
        files = [self._file(image) for image in images.detach().float().cpu()]
        found = {index: features for index, file in enumerate(files) if (features := self._read(file)) is not None}
        missing = [index for index in range(len(files)) if index not in found]
        if missing:
            computed = self.encoder.encode(images[missing]).half().cpu()
            for index, features in zip(missing, computed, strict=True):
                found[index] = features
                self._write(files[index], features)
        return torch.stack([found[index] for index in range(len(files))]).to(images.device).float()

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)

    def _file(self, image: Tensor) -> Path:
        shape = "x".join(map(str, image.shape)).encode()
        name = hashlib.blake2b(image.contiguous().numpy().tobytes(), key=shape, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, file: Path) -> Tensor | None:
        """The features in a file; None where there is none or it is damaged, so that they are computed again."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            features = load_file(file)["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        return features if features.dim() == 3 and features.shape[0] == self.dim else None

    def _write(self, file: Path, features: Tensor) -> None:
        def write() -> None:
            file.parent.mkdir(exist_ok=True)
            save_tensors(file, {"features": features.contiguous()})

        self._refuse_errors(write)

    def _refuse_errors(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(
                f"data.features.cache: '{self.folder}' cannot be written ({error.strerror or error}); choose another "
                "folder, or null"
            ) from error
