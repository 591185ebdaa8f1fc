"""``data.*``: images, their conditions, and the encoders that process both."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from megadit.config.options import Scalar, with_defaults
from megadit.config.schema.registered import Registered
from megadit.config.schema.section import Section
from megadit.config.schema.values import shown
from megadit.extensions import DATA_SOURCES

Crop = Literal["adm", "center"]
OnCorrupt = Literal["stop"]


class VaeConfig(Section):
    """The autoencoder that encodes images as they are read, or that made the stored latents."""

    path: str | None = Field(None, description="folder of a diffusers AutoencoderKL, or of a PCA patch codec")
    scale: float | None = Field(None, gt=0, description="factor on latents; null: that of the autoencoder's config")
    shift: float | None = Field(
        None, description="subtracted from latents before scaling; null: that of the autoencoder's config"
    )
    factor: int = Field(8, ge=1, description="image pixels per latent pixel along a side")


class TextSource(Section):
    """The encoder of captions. Shards with stored text features need it for new prompts only."""

    encoder: Literal["minilm", "t5", "clip"] = Field(
        "minilm", description="minilm: all-MiniLM-L6-v2 of its package; t5, clip: transformers folders at path"
    )
    path: str | None = Field(None, description="folder of the encoder; minilm: null, its installed package")
    pooled: Literal["none", "same", "clip"] = Field(
        "none", description="pooled feature: of the same encoder, or of a CLIP text model at pooled_path"
    )
    pooled_path: str | None = Field(None, description="folder of the CLIP text model with projection")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the encoder's weights and arithmetic")
    cache: str | None = Field(None, description="folder for computed features; null: the user's cache folder")


class FeatureSource(Section):
    """Target features of the REPA loss."""

    encoder: Literal["efficientnet-lite0", "dinov2", "stored"] = Field(
        "efficientnet-lite0",
        description="efficientnet-lite0: of its package; dinov2: a transformers folder at path; stored: features "
        "in the shards",
    )
    path: str | None = Field(None, description="dinov2: folder of the model")
    image_size: int = Field(128, ge=1, description="side in pixels to which images are resized for the encoder")
    cache: str | None = Field(None, description="folder for computed features; null: compute them as images are read")


class DataConfig(Section):
    """The data set, its conditions and its preprocessing."""

    name: Annotated[str, Registered(DATA_SOURCES)] = Field("emoji", description="the data set")
    path: str | None = Field(
        None,
        description="folder of fashion-mnist or image-folder data; webdataset: folder of tars, or shards like "
        "name-{000000..000009}.tar",
    )
    image_size: int | None = Field(None, ge=1, description="side in pixels; default: the data set's own size")
    condition: Literal["class", "text", "none"] = Field("class", description="the model's condition")
    classes: tuple[str, ...] | None = Field(None, description="keep only these classes, in this order; null: all")
    flip: bool = Field(False, description="mirror half of the images")
    crop: Crop = Field(
        "adm",
        description="image-folder, and tars whose images have another size: resizing before the centre crop. adm: "
        "as ADM and DiT, box-filtered halvings, then bicubic; center: as PixArt-alpha, bilinear in one step",
    )
    val_fraction: float = Field(0.05, ge=0, lt=1, description="share of images held out, split by base name")
    skin_tones: bool = Field(False, description="emoji: keep the skin-tone variants")
    workers: int = Field(0, ge=0, description="decoding processes per rank")
    vae: VaeConfig | None = Field(None, description="train on latents of this autoencoder; null: on pixels")
    text: TextSource = TextSource()
    max_missing_captions: float = Field(
        0.5, ge=0, le=1, description="largest accepted share of images without a caption, with a warning"
    )
    features: FeatureSource | None = Field(None, description="target features of the REPA loss; null: none")
    options: dict[str, Scalar] = Field({}, description="options of a plugin's data source, as name: value")
    on_change: Literal["refuse", "accept"] = Field(
        "refuse",
        description="on resuming with other images, classes or encoders than the checkpoint's: refuse, or accept "
        "and record the change",
    )
    on_corrupt: OnCorrupt = Field(
        "stop",
        description="on an image that cannot be read: stop, with an error that names file, sample and step. "
        "Skipping it would change the numbers, and so the noise, of all later samples",
    )

    def __hash__(self) -> int:  # of some keys: options, a dict, has no hash; ``==`` compares all
        return hash((self.name, self.path, self.image_size, self.condition))

    @field_validator("options")
    @classmethod
    def _declared(cls, given: dict[str, Scalar], info: ValidationInfo) -> dict[str, Scalar]:
        """Options with the source's defaults. Raises ValueError for an undeclared one, or one of another type."""
        if "name" not in info.data:  # an error by itself
            return given
        source = DATA_SOURCES.get(info.data["name"])
        return with_defaults(given, source.options, f"data source {info.data['name']}")

    @field_validator("classes")
    @classmethod
    def _some_class(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value == ():
            raise ValueError("classes: [] keeps no class; name those to keep, or set null for all")
        return value

    @field_validator("on_corrupt", mode="before")
    @classmethod
    def _stop(cls, value: object) -> object:
        if value != "stop":
            raise ValueError(
                f"on_corrupt: {shown(value)} is not possible: to pass over an image gives all later samples other "
                "numbers, and so other noise; set data.on_corrupt=stop, and replace the image or take it out of the set"
            )
        return value
