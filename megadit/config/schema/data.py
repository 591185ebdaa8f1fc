"""``data.*``: images, what they are conditioned on, and what is computed from them before the model."""

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
    """An autoencoder folder that turns images into latents as they are read, or that the stored latents came from."""

    path: str | None = Field(None, description="folder of a diffusers AutoencoderKL, or of a PCA patch codec")
    scale: float | None = Field(
        None, gt=0, description="latents are multiplied by this; null: what the autoencoder's own config says"
    )
    shift: float | None = Field(
        None, description="subtracted from latents before scaling; null: what the autoencoder's own config says"
    )
    factor: int = Field(8, ge=1, description="image pixels per latent pixel along a side")


class TextSource(Section):
    """Who turns captions into features. Shards that hold text features need no encoder but for new prompts."""

    encoder: Literal["minilm", "t5", "clip"] = Field(
        "minilm", description="minilm: all-MiniLM-L6-v2 of its package; t5, clip: transformers folders at path"
    )
    path: str | None = Field(None, description="folder of the encoder; minilm: null, its installed package")
    pooled: Literal["none", "same", "clip"] = Field(
        "none", description="pooled feature: of the same encoder, or of a CLIP text model at pooled_path"
    )
    pooled_path: str | None = Field(None, description="folder of the CLIP text model with projection")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's weights and arithmetic")
    cache: str | None = Field(None, description="folder for computed features; null: the user's cache folder")


class FeatureSource(Section):
    """Target features of REPA."""

    encoder: Literal["efficientnet-lite0", "dinov2", "stored"] = Field(
        "efficientnet-lite0", description="its package's network; a transformers folder at path; or what shards hold"
    )
    path: str | None = Field(None, description="dinov2: folder of the model")
    image_size: int = Field(128, ge=1, description="side in pixels to which images are resized for the encoder")
    cache: str | None = Field(None, description="folder for computed features; null: compute them as images are read")


class DataConfig(Section):
    """Where images come from and what conditions them."""

    name: Annotated[str, Registered(DATA_SOURCES)] = Field("emoji", description="the data set")
    path: str | None = Field(
        None,
        description="folder of fashion-mnist or image-folder data; webdataset: folder of tars, or shards like "
        "name-{000000..000009}.tar",
    )
    image_size: int | None = Field(None, ge=1, description="side in pixels; default: the data set's own size")
    condition: Literal["class", "text", "none"] = Field("class", description="what the model is told of an image")
    classes: tuple[str, ...] | None = Field(None, description="keep only these classes, in this order; null: all")
    flip: bool = Field(False, description="mirror half of the images")
    crop: Crop = Field(
        "adm",
        description="image-folder, and tars whose images have another size: how a square is cut. adm: as ADM and DiT, "
        "box-filtered halvings, then bicubic; center: as PixArt-alpha, bilinear in one step. Both cut the centre",
    )
    val_fraction: float = Field(0.05, ge=0, lt=1, description="share held out, split by base name")
    skin_tones: bool = Field(False, description="emoji: keep the skin-tone variants")
    workers: int = Field(0, ge=0, description="decoding processes per rank")
    vae: VaeConfig | None = Field(None, description="train on latents of this autoencoder; null: on pixels")
    text: TextSource = TextSource()
    max_missing_captions: float = Field(
        0.5, ge=0, le=1, description="share of images without a caption up to which a run is warned and not refused"
    )
    features: FeatureSource | None = Field(None, description="target features of the REPA loss; null: none")
    options: dict[str, Scalar] = Field({}, description="name: value pairs that a plugin's data source declares")
    on_change: Literal["refuse", "accept"] = Field(
        "refuse",
        description="a run that resumes with other images, classes or encoders than its checkpoint's: refuse it, or "
        "accept, go on and record it",
    )
    on_corrupt: OnCorrupt = Field(
        "stop",
        description="an image that cannot be read: stop, naming file, sample and step. Nothing else yet, since to pass "
        "over an image gives all later samples other numbers, and so other noise",
    )

    def __hash__(self) -> int:  # of some keys, since options, a dict, has no hash; ``==`` compares all of them
        return hash((self.name, self.path, self.image_size, self.condition))

    @field_validator("options")
    @classmethod
    def _declared(cls, given: dict[str, Scalar], info: ValidationInfo) -> dict[str, Scalar]:
        """All options of the source. Raises ValueError for one that it does not declare, or of another type."""
        if "name" not in info.data:  # which is refused already
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
