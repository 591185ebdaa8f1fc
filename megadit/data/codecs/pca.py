"""A patch codec in closed form: the first principal components of image patches, an autoencoder without training.

Patches of ``factor`` x ``factor`` pixels become ``channels`` latent values. Its folder looks like a diffusers
autoencoder's (``config.json`` with ``_class_name``, safetensors weights), so it stands wherever one would. It is what
latent runs use where no trained autoencoder is at hand: linear, exact up to the components that are left out, the
same on every machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megadit.config.schema.data import DataConfig, VaeConfig
from megadit.data.batch import scale_images
from megadit.data.build import build_datasets
from megadit.data.codecs.codec import Codec, scale_and_shift
from megadit.data.codecs.folder import codec_folder, read_facts
from megadit.data.dataset import ImageSet, evenly_spaced, print_remarks, stack_images
from megadit.errors import UserError, one_line
from megadit.files.file_kind import other_among
from megadit.files.ownership import acquire_folder, is_lock_file
from megadit.files.paths import atomic_write, save_tensors
from megadit.files.text import json_bytes
from megadit.finite import describe_nonfinite

PCA_CLASS = "PcaPatchCodec"
_WEIGHTS = "codec.safetensors"
_PER_PASS = 64


@dataclass(frozen=True, eq=False)
class PatchPca:
    """mean (C f f) and components (z, C f f), float32: patches in the order channel, row, column.

    scale: latents are multiplied by it, so that all of them together have unit standard deviation.
    """

    mean: Tensor
    components: Tensor
    image_channels: int
    factor: int
    scale: float

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.components.shape[0])

    def to(self, device: torch.device | str) -> PatchPca:
        """The same codec on ``device``."""
        return PatchPca(self.mean.to(device), self.components.to(device), self.image_channels, self.factor, self.scale)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents before scaling, float32 (B, z, H / f, W / f)."""
        shape = (self.channels, self.image_channels, self.factor, self.factor)
        bias = -(self.components @ self.mean)
        return functional.conv2d(images.float(), self.components.view(shape), bias, stride=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents before scaling -> images, float32 (B, C, H, W)."""
        shape = (self.channels, self.image_channels, self.factor, self.factor)
        rows, columns = latents.shape[-2:]
        patch = self.mean.view(1, self.image_channels, self.factor, self.factor)
        images = functional.conv_transpose2d(latents.float(), self.components.view(shape), stride=self.factor)
        return images + patch.repeat(1, 1, rows, columns)


class PcaCodec(Codec):
    """A PCA patch codec's folder (``tools/encode.py fit-pca``). Its latents have no posterior: keys are not used.

    Raises UserError if the folder does not load, or ``data.vae.scale`` or ``shift`` is given and not the codec's own:
    these were fitted with it.
    """

    fitted_scale = True

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        folder = codec_folder(config)
        self.scale, _ = scale_and_shift(config, read_facts(folder))
        self.device = torch.device(device)
        self.pca = load_pca(folder).to(self.device)
        self.factor, self.channels = self.pca.factor, self.pca.channels

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """The projections of each patch, scaled. Raises UserError if the size or channels do not fit."""
        channels, height, width = images.shape[1:]
        if channels != self.pca.image_channels or height % self.factor or width % self.factor:
            raise UserError(
                f"data.vae.path: this codec takes images of {self.pca.image_channels} channel(s) and multiples of "
                f"{self.factor} pixels, not {channels} and {height}x{width}; fit one on these images"
            )
        return self.pca.encode(images.to(self.device)) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images from the first principal components."""
        return self.pca.decode(latents.to(self.device, torch.float32) / self.scale)


def fit_pca(dataset: ImageSet, indices: Sequence[int], factor: int, channels: int) -> PatchPca:
    """The codec of these images, from the covariance of their patches in float64: no seed, no iterations.

    Raises UserError where ``factor`` does not divide the images or a patch has fewer values than ``channels``.
    """
    size = factor * factor * dataset.channels
    if dataset.image_size % factor:
        raise UserError(
            f"--factor: {factor} does not divide images of {dataset.image_size} pixels; choose one that does"
        )
    if not 1 <= channels <= size:
        raise UserError(
            f"--channels: {channels} is not from 1 to the {size} values of a {factor}x{factor} patch of "
            f"{dataset.channels} channel(s)"
        )
    total, square, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64), 0
    for images in _batches(dataset, indices):
        patches = functional.unfold(images, factor, stride=factor).transpose(1, 2).reshape(-1, size).double()
        total += patches.sum(0)
        square += patches.T @ patches
        count += len(patches)
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    components = vectors.T.flip(0)[:channels]
    # A component's sign is free: its largest entry is positive, so that every machine finds the same one.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    variance = float(values.flip(0)[:channels].clamp(min=0).mean())
    if variance <= 0:
        raise UserError("data.path: all patches of these images are the same; there is nothing to fit")
    return PatchPca(mean.float(), components.float(), dataset.channels, factor, float(f"{variance**-0.5:.6g}"))


def measure_psnr(codec: PatchPca, dataset: ImageSet, indices: Sequence[int]) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructions, from the mean squared error over all these images."""
    error, count = 0.0, 0
    for images in _batches(dataset, indices):
        decoded = codec.decode(codec.encode(images)).clamp(-1, 1)
        error += float((decoded - images).double().square().sum())
        count += images.numel()
    return math.inf if error == 0 else 10 * math.log10(4 * count / error)  # images span 2, from -1 to 1


def _batches(dataset: ImageSet, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), _PER_PASS):
        yield scale_images(stack_images(dataset, indices[start : start + _PER_PASS]))


def save_pca(codec: PatchPca, folder: Path, facts: dict[str, Any]) -> None:
    """Write the codec's folder; ``facts`` (what it was fitted on, its PSNR) go into ``config.json`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": codec.mean.contiguous(), "components": codec.components.contiguous()}
    save_tensors(folder / _WEIGHTS, tensors)
    config = {
        "_class_name": PCA_CLASS,
        "factor": codec.factor,
        "channels": codec.channels,
        "image_channels": codec.image_channels,
        "scaling_factor": codec.scale,
        "shift_factor": 0.0,
        **facts,
    }
    with atomic_write(folder / "config.json") as temporary:  # last: a folder without it is no codec
        temporary.write_bytes(json_bytes(json.dumps(config, indent=1, ensure_ascii=False) + "\n"))


def load_pca(folder: Path) -> PatchPca:
    """The codec of a folder that ``save_pca`` wrote. Raises UserError that names ``data.vae.path`` if it is damaged."""
    from safetensors.torch import load_file

    facts = read_facts(folder)
    try:
        tensors = load_file(folder / _WEIGHTS)
        codec = PatchPca(tensors["mean"], tensors["components"], facts.image_channels, facts.factor, facts.scale)
        size = codec.image_channels * codec.factor**2
        if codec.mean.shape != (size,) or codec.components.shape != (facts.channels, size):
            raise ValueError("its weights have other sizes than its config.json")
        problem = describe_nonfinite(tensors.items())
        if problem:
            raise ValueError(problem)
    except Exception as error:  # whatever json and safetensors say about damaged files
        reason = other_among([folder / "config.json", folder / _WEIGHTS]) or one_line(error)
        raise UserError(
            f"data.vae.path: {folder} does not load as a {PCA_CLASS} ({reason}); fit it again with tools/encode.py"
        ) from error
    return codec


def fit_and_save(config: DataConfig, folder: Path, factor: int, channels: int, most: int) -> dict[str, Any]:
    """Fit on (an even choice of at most ``most`` images of) the training part, measure on the held-out part, save.

    Returns what ``encode.py fit-pca --json`` prints. Raises UserError as ``build_datasets`` and ``fit_pca`` do, or for
    a folder in use.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: '{folder}' is a file; choose another folder")
    with acquire_folder(folder, "fitting a codec"):
        return _fit_and_save(config, folder, factor, channels, most)


def _fit_and_save(config: DataConfig, folder: Path, factor: int, channels: int, most: int) -> dict[str, Any]:
    if any(not is_lock_file(path.name) for path in folder.iterdir()):
        raise UserError(f"--out: '{folder}' is not empty; choose another folder")
    train, held_out = build_datasets(config)
    print_remarks(train)
    if train.stores_latents:
        raise UserError(f"data.path: {config.path} holds latents; give images to fit on")
    chosen = evenly_spaced(range(len(train)), most)
    codec = fit_pca(train, chosen, factor, channels)
    measured = evenly_spaced(range(len(held_out)), most)
    psnr = round(measure_psnr(codec, held_out, measured), 3) if measured else None
    facts = {"fitted_on": len(chosen), "data": train.name, "held_out": len(measured), "psnr": psnr}
    save_pca(codec, folder, facts)
    use = f"data.vae.path={folder} data.vae.factor={factor} model.in_channels={channels}"
    return {"out": str(folder), **facts, "scale": codec.scale, "use": use}
