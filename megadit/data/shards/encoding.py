"""From a set to tars of what a run would compute from it: latents, text features, REPA's target features.

A run on these tars trains on the same tensors. Of a VAE, mean and standard deviation of the posterior are stored, so
that every epoch samples anew by the run's own keyed noise (PixArt's practice; ``posterior="sample"`` stores one sample,
as DiT's feature extraction does), and with ``data.flip`` also those of the mirrored image, since a mirrored latent is
not the latent of the mirrored image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megadit.config import DataConfig
from megadit.data.batch import scale_images
from megadit.data.codecs.codec import Codec, GaussianCodec, build_codec, check_vae, codec_identity, scale_and_shift
from megadit.data.codecs.folder import codec_facts
from megadit.data.dataset import ImageSet, ProgressCallback, StoredFacts, stack_images
from megadit.data.shards import members, naming, writing
from megadit.data.shards.manifest import Manifest
from megadit.data.shards.naming import Sharding
from megadit.errors import UserError
from megadit.files.paths import save_tensors
from megadit.rng import sample_keys

if TYPE_CHECKING:
    from megadit.data.features.encoders import FeatureEncoder
    from megadit.data.text.encoders import TextEncoder

_CHUNK = 64  # images at once


@dataclass(frozen=True)
class Encoding:
    """How features are stored. posterior: of an AutoencoderKL.  max_length: tokens of a text; longer ones are cut.

    seed: of the samples of ``posterior="sample"``.
    """

    dtype: Literal["float16", "float32"] = "float16"
    posterior: Literal["moments", "sample"] = "moments"
    max_length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Encoders:
    """The networks whose outputs are stored; None: not stored."""

    codec: Codec | None
    text: TextEncoder | None
    features: FeatureEncoder | None


def encode_set(
    config: DataConfig,
    folder: Path,
    sharding: Sharding,
    encoding: Encoding,
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write the whole set of ``config`` as tars: latents of its ``vae`` (images where there is none), features of its
    ``text`` encoder (with condition text) and of ``features``.

    An interrupted set is resumed. Raises UserError as ``build_datasets``, the encoders and ``SetWriter`` do.
    """
    images, bases = writing.set_to_write(config, folder)
    encoders = _encoders(config, encoding, images, device)
    stored = _facts(config, encoding, images, encoders)
    made = {"command": "encode", "data": writing.data_settings(config), **asdict(encoding), "stored": asdict(stored)}
    with writing.SetWriter(folder, sharding, writing.recipe_of(made)) as writer:
        done = writer.done
        start = done // _CHUNK * _CHUNK  # the same chunks as without an interruption, so that rounding is the same
        for first in range(start, len(images), _CHUNK):
            numbers = range(first, min(first + _CHUNK, len(images)))
            for i, arrays in zip(numbers, _chunk(images, numbers, encoders, encoding, stored), strict=True):
                if i >= done:
                    writer.add(writing.sample_key(i), {**arrays, **writing.text_members(images, bases, i)})
            if progress is not None:
                progress(numbers.stop, len(images))
        if encoders.text is not None:
            _save_null_text(encoders.text, encoding, folder)
        return writer.finish(replace(writing.new_manifest(images, made), stored=stored))


def _encoders(config: DataConfig, encoding: Encoding, images: ImageSet, device: str) -> _Encoders:
    if images.stores_latents:
        raise UserError(f"data.path: {config.path} holds latents already; give the images that they were made of")
    features = config.features is not None and config.features.encoder != "stored"
    if config.vae is None and config.condition != "text" and not features:
        raise UserError(
            "data.vae: is not given, nor data.condition=text or data.features, so that there is nothing to encode; "
            "set one of them (tools/make_shards.py writes images as they are)"
        )
    check_vae(config.vae, image_channels=images.channels)
    text: TextEncoder | None = None
    if config.condition == "text":
        from megadit.data.text.encoders import build_encoder

        text = build_encoder(config.text, device)
        if encoding.max_length is None:
            raise UserError("--max_length: is not given; say how many tokens a text may have, or give --config")
        if text.longest is not None and encoding.max_length > text.longest:
            raise UserError(
                f"--max_length: {encoding.max_length}, but data.text.encoder takes {text.longest} tokens; lower it"
            )
    feature_encoder: FeatureEncoder | None = None
    if features and config.features is not None:
        from megadit.data.features.targets import build_encoder as build_features

        feature_encoder = build_features(config.features.model_copy(update={"cache": None}), device)
    return _Encoders(None if config.vae is None else build_codec(config.vae, device), text, feature_encoder)


def _facts(config: DataConfig, encoding: Encoding, images: ImageSet, encoders: _Encoders) -> StoredFacts:
    facts = StoredFacts(mirrored=config.flip and (encoders.codec is not None or encoders.features is not None))
    codec, text = encoders.codec, encoders.text
    if codec is not None and config.vae is not None:
        if images.image_size % codec.factor:
            raise UserError(
                f"data.image_size: {images.image_size} is not a multiple of {codec.factor}, the codec's factor; "
                "choose one that is"
            )
        scale, shift = scale_and_shift(config.vae, codec_facts(config.vae))
        facts = replace(
            facts, channels=int(codec.channels or 0), size=images.image_size // codec.factor, factor=codec.factor,
            scale=scale, shift=shift, codec=codec_identity(config.vae),
            moments=isinstance(codec, GaussianCodec) and encoding.posterior == "moments",
        )  # fmt: skip
    if text is not None and encoding.max_length is not None:
        captions = sorted({images.caption(i) for i in range(len(images))})
        longest = max(len(ids) for ids in text.token_ids([*captions, ""]))
        facts = replace(
            facts, text_dim=text.dim, pooled_dim=text.pooled_dim, text_encoder=text.identity,
            text_length=min(longest, encoding.max_length),
        )  # fmt: skip
    if encoders.features is not None:
        facts = replace(facts, feature_dim=encoders.features.dim, feature_encoder=encoders.features.identity)
    return facts


def _chunk(
    images: ImageSet, numbers: range, encoders: _Encoders, encoding: Encoding, stored: StoredFacts
) -> Iterator[dict[str, bytes]]:
    """The members with arrays, or images, of each of these samples."""
    raw = stack_images(images, numbers)
    pixels = scale_images(raw)
    columns: dict[str, list[Tensor]] = {}
    for turned in (False, True) if stored.mirrored else (False,):
        inputs = pixels.flip(-1) if turned else pixels
        if encoders.codec is not None:
            name = naming.LATENT_MIRRORED if turned else naming.LATENT
            columns[name] = list(_latents(encoders.codec, inputs, numbers, encoding))
        if encoders.features is not None:
            name = naming.FEATURES_MIRRORED if turned else naming.FEATURES
            columns[name] = list(encoders.features.encode(inputs))
    if encoders.text is not None and encoding.max_length is not None:
        features = list(encoders.text.features([images.caption(i) for i in numbers], encoding.max_length))
        columns[naming.TEXT] = [states for states, _ in features]
        if stored.pooled_dim:
            columns[naming.POOLED] = [pooled for _, pooled in features]
    for row in range(len(numbers)):
        arrays = {name: _array(values[row], encoding.dtype, name) for name, values in columns.items()}
        yield arrays if encoders.codec is not None else {"png": members.write_picture(raw[row], "png", 0), **arrays}


def _latents(codec: Codec, pixels: Tensor, numbers: range, encoding: Encoding) -> Tensor:
    if isinstance(codec, GaussianCodec) and encoding.posterior == "moments":
        return torch.cat(codec.posterior(pixels), dim=1)
    return codec.encode(pixels, sample_keys(encoding.seed, "stored-latent", numbers))


def _array(value: Tensor, dtype: str, name: str) -> bytes:
    value = value.detach().cpu()
    stored = value.to(getattr(torch, dtype))
    if not bool(stored.isfinite().all()):
        finite = bool(value.isfinite().all())
        problem = "is beyond float16's range; give --dtype float32" if finite else "is not a number"
        raise UserError(f"--dtype: a value of {name} {problem}")
    return members.write_array(stored)


def _save_null_text(encoder: TextEncoder, encoding: Encoding, folder: Path) -> None:
    assert encoding.max_length is not None
    state, pooled = next(iter(encoder.features([""], encoding.max_length)))
    tensors: dict[str, Any] = {"text": state.contiguous(), **({"pooled": pooled} if len(pooled) else {})}
    save_tensors(folder / naming.NULL_TEXT, tensors)
