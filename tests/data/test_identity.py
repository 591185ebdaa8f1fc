"""What a run is trained on: everything that changes it is a difference named with both values, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import pytest
from PIL import Image

from helpers.training import small_config
from megadit.config import DataConfig, RunConfig
from megadit.data import build_datasets
from megadit.data.identity import config_differences, crop_note, differences, identify
from megadit.data.shards.naming import Sharding
from megadit.data.shards.tar_set import TarSet
from megadit.data.shards.writing import make_shards

CLASSES = ("ant", "cat", "dog")


def identity(config):
    train, held_out = build_datasets(config.data)
    return json.loads(json.dumps(identify(config, train, held_out)))


def data_changes(before, config):
    train, held_out = build_datasets(config.data)
    return differences(before, identify(config, train, held_out), train)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (label, number, 0)).save(folder / name / f"{number:02d}.png")
    return folder


def of_folder(path, **data):
    classes = len([entry for entry in path.iterdir() if entry.is_dir()]) if data.get("condition") != "none" else 0
    more = {} if classes else {"sample": {"guidance": 1.0}}
    return small_config(
        model={"in_channels": 3, "num_classes": classes},
        data={"name": "image-folder", "path": str(path), "image_size": 8, "val_fraction": 0.2, **data},
        **more,
    )


def test_moved_copied_and_touched_data_are_the_same(pictures, tmp_path):
    before = identity(of_folder(pictures))
    assert before["training_images"] + before["validation_images"] == 60
    other = shutil.copytree(pictures, tmp_path / "elsewhere" / "deeper")  # another path, other times, other inodes
    for file in sorted(other.rglob("*.png"), reverse=True):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        os.utime(file, (1, 1))
    assert data_changes(before, of_folder(other)) == []
    assert identity(of_folder(other)) == before
    assert data_changes(before, of_folder(other, workers=3, on_change="accept")) == []


def test_a_renamed_class_is_named_with_its_number(pictures):
    before = identity(of_folder(pictures))
    (pictures / "cat").rename(pictures / "zebra")
    first, second = data_changes(before, of_folder(pictures))
    assert first == "class 1 was 'cat' and is 'dog', and 1 more differ"
    assert second.endswith("(first difference: cat/00.png is gone)")


def test_a_class_more_or_less_is_named(pictures):
    before = identity(of_folder(pictures))
    shutil.copytree(pictures / "cat", pictures / "bee")
    assert data_changes(before, of_folder(pictures))[0] == "there were 3 classes and are 4 ('bee' is new)"
    shutil.rmtree(pictures / "bee")
    shutil.rmtree(pictures / "ant")
    assert data_changes(before, of_folder(pictures))[0] == "there were 3 classes and are 2 ('ant' is gone)"


def test_images_that_come_go_or_are_written_again(pictures):
    before = identity(of_folder(pictures))
    train, held_out = before["training_images"], before["validation_images"]
    for number in range(20, 60):
        shutil.copy(pictures / "dog/00.png", pictures / f"dog/{number}.png")
    (change,) = data_changes(before, of_folder(pictures))
    now = identity(of_folder(pictures))
    counts = f"training images {train} → {now['training_images']}, validation images {held_out} → "
    assert change == counts + f"{now['validation_images']} (first difference: dog/20.png is new)"
    for number in range(20, 60):
        (pictures / f"dog/{number}.png").unlink()
    assert data_changes(before, of_folder(pictures)) == []
    Image.new("RGB", (80, 80), "red").save(pictures / "cat/03.png")
    size = (pictures / "cat/03.png").stat().st_size
    (change,) = data_changes(before, of_folder(pictures))
    assert change.startswith(f"other images (first difference: cat/03.png has {size:,} bytes and had ")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"flip": True}, "data.flip was false and is true"),
        ({"crop": "center"}, "data.crop was adm and is center"),
        ({"val_fraction": 0.5}, "data.val_fraction 0.2 → 0.5, training images "),
        ({"classes": ("dog", "cat", "ant")}, "class 0 was 'ant' and is 'dog', and 1 more differ"),
        ({"condition": "none"}, "data.condition was class and is none"),
    ],
)
def test_keys_that_change_what_is_trained_on(pictures, data, said):
    changes = data_changes(identity(of_folder(pictures)), of_folder(pictures, **data))
    assert changes[0].startswith(said)


def of_lines(path, **data):
    config = {"name": "image-folder", "path": str(path), "image_size": 8, "val_fraction": 0.2, **data}
    return RunConfig.model_construct(**{**dict(small_config()), "data": DataConfig.model_validate(config)})


def write_lines(folder, change):
    lines = [
        {"file_name": f"{name}/{n:02d}.png", "label": name, "caption": f"{name} {n}"}
        for name in CLASSES
        for n in range(20)
    ]
    lines = change(lines)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_labels_and_order_of_metadata(pictures):
    write_lines(pictures, lambda lines: lines)
    before = identity(of_lines(pictures))
    write_lines(pictures, lambda lines: [{**line, "caption": "new"} for line in lines])
    assert data_changes(before, of_lines(pictures)) == []  # captions are not what this run reads
    write_lines(pictures, lambda lines: [*lines[:5], {**lines[5], "label": "dog"}, *lines[6:]])
    assert data_changes(before, of_lines(pictures)) == ["images of the same files have other labels"]
    write_lines(pictures, lambda lines: [lines[1], lines[0], *lines[2:]])
    (change,) = data_changes(before, of_lines(pictures))
    assert change == "other images (first difference: ant/01.png is in the place of ant/00.png)"


def test_shards_that_are_added_renamed_or_written_again(tmp_path):
    make_shards(DataConfig(name="digits"), tmp_path / "tars", Sharding("digits", 200))
    (tmp_path / "tars/manifest.json").unlink()
    files = sorted((tmp_path / "tars").glob("*.tar"))
    aside = tmp_path / "aside"
    aside.mkdir()
    for file in files[6:]:
        file.rename(aside / file.name)
    config = small_config(
        model={"in_channels": 3}, data={"name": "webdataset", "path": str(tmp_path / "tars"), "image_size": 8}
    )
    before = identity(config)
    assert before["files"]["count"] == 6 and before["training_images"] + before["validation_images"] == 1200
    shutil.copytree(tmp_path / "tars", tmp_path / "moved")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "moved")})})
    assert data_changes(before, moved) == []
    for file in sorted(aside.iterdir()):
        file.rename(tmp_path / "tars" / file.name)
    (change,) = data_changes(before, config)
    assert change.startswith(f"training images {before['training_images']:,} → ")
    assert change.endswith("(first difference: digits-000006.tar is new)")
    for file in files[6:]:
        file.unlink()
    files[2].rename(files[2].with_name("digits-a.tar"))
    (change,) = data_changes(before, config)
    assert "first difference: digits-000002.tar is gone" in change


def test_built_in_sets():
    digits = small_config()
    assert data_changes(identity(digits), digits) == []
    assert data_changes(identity(digits), small_config(data={"classes": tuple("1023456789")})) == [
        "class 0 was '0' and is '1', and 1 more differ"
    ]
    emoji = {"model": {"in_channels": 3, "input_size": 8, "num_classes": 9}, "data": {"name": "emoji", "image_size": 8}}
    before = identity(small_config(**emoji))
    more = {**emoji, "data": {**emoji["data"], "skin_tones": True}}
    (change,) = data_changes(before, small_config(**more))
    assert change.startswith(f"training images {before['training_images']:,} → ") and "first difference: " in change


def of_text(pictures, **text):
    model = {"in_channels": 3, "num_classes": 0, "text": {"dim": 16, "max_length": 8}, "family": "mmdit"}
    data = {"name": "image-folder", "path": str(pictures), "image_size": 8, "condition": "text", "text": text}
    return small_config(model=model, data=data)


def test_captions_and_their_encoder(pictures, tmp_path):
    write_lines(pictures, lambda lines: lines)
    folder = tmp_path / "t5"  # what an encoder's identity is made of, no network
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16}))
    (folder / "model.safetensors").write_bytes(b"weights")
    config = of_text(pictures, encoder="t5", path=str(folder))
    before = identity(config)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert data_changes(before, of_text(pictures, encoder="t5", path=str(moved), cache=str(tmp_path))) == []
    write_lines(pictures, lambda lines: [{**lines[0], "caption": "new"}, *lines[1:]])
    assert data_changes(before, config) == ["images of the same files have other captions"]
    write_lines(pictures, lambda lines: lines)
    (folder / "model.safetensors").write_bytes(b"others!")
    (change,) = data_changes(before, config)
    assert change.startswith(f"the text encoder was {before['text_encoder']} and is t5:")
    (change,) = data_changes(before, of_text(pictures, encoder="t5", path=str(moved), precision="bf16"))
    assert change.endswith(":bf16 pooled none")


def vae(folder, **facts):
    folder.mkdir(exist_ok=True)
    shown = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4, **facts}
    (folder / "config.json").write_text(json.dumps(shown))
    (folder / "weights.safetensors").write_bytes(b"weights")
    return folder


def test_the_autoencoder_with_scale_and_shift(pictures, tmp_path):
    def of_vae(folder, **more):
        data = {"name": "image-folder", "path": str(pictures), "image_size": 8}
        model = {"in_channels": 4, "input_size": 4, "num_classes": 3}
        return small_config(model=model, data={**data, "vae": {"path": str(folder), "factor": 2, **more}})

    before = identity(of_vae(vae(tmp_path / "vae", scaling_factor=0.5)))
    assert data_changes(before, of_vae(shutil.copytree(tmp_path / "vae", tmp_path / "moved"), scale=0.5)) == []
    (change,) = data_changes(before, of_vae(tmp_path / "vae", scale=0.25, shift=0.125))
    assert change == "the autoencoder differs: scale 0.5 → 0.25, shift 0 → 0.125"
    (tmp_path / "vae/weights.safetensors").write_bytes(b"others!")
    (change,) = data_changes(before, of_vae(tmp_path / "vae"))
    assert change.startswith("the autoencoder differs: codec AutoencoderKL:")
    config = small_config(model={"in_channels": 3, "num_classes": 3}, data=of_folder(pictures).data.model_dump())
    assert data_changes(before, config)[-1] == "there was an autoencoder and now there is none"


def test_the_autoencoder_of_tars_from_before_their_crop_was_kept(pictures, tmp_path):
    """That ``data.crop`` has no effect on them says nothing of the codec that reads them."""
    data = of_folder(pictures).data
    make_shards(data, tmp_path / "tars", Sharding("x", 100))
    manifest = json.loads((tmp_path / "tars/manifest.json").read_text())
    del manifest["made"]["data"]["crop"]
    (tmp_path / "tars/manifest.json").write_text(json.dumps(manifest))

    def of_tars(scale):
        codec = {"path": str(vae(tmp_path / "vae")), "factor": 2, "scale": scale}
        where = {"name": "webdataset", "path": str(tmp_path / "tars"), "image_size": 8, "crop": "center"}
        return small_config(model={"in_channels": 4, "input_size": 4, "num_classes": 3}, data={**where, "vae": codec})

    assert data_changes(identity(of_tars(0.5)), of_tars(0.25)) == ["the autoencoder differs: scale 0.5 → 0.25"]


def test_keys_that_only_one_of_two_identities_has_are_not_compared():
    config = small_config()
    before = identity(config)
    del before["crop"], before["files"], before["captions"]
    assert data_changes({**before, "younger": 3}, config) == []


def test_the_crop_of_pictures_says_nothing_of_latents(pictures, tmp_path, monkeypatch):
    """They were cut when they were computed; an old run on latents goes on where a file of ours has another crop."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, file in enumerate(sorted(pictures.rglob("*.png"))):
            tar.add(file, f"{number}.png")
    data = {"name": "webdataset", "path": str(tmp_path / "x.tar"), "condition": "none", "image_size": 8}
    one, other = (
        small_config(model={"in_channels": 3, "num_classes": 0}, data={**data, "crop": crop}, sample={"guidance": 1.0})
        for crop in ("adm", "center")
    )
    assert data_changes(identity(one), other) == ["data.crop was adm and is center"]
    monkeypatch.setattr(TarSet, "stores_latents", True)
    assert data_changes(identity(one), other) == [] and data_changes({**identity(one), "crop": "adm"}, other) == []
    train, _ = build_datasets(other.data)
    before = one.data.model_dump(mode="json")
    assert config_differences(before, None, other, train) == [] and crop_note(before, other, train) is None
