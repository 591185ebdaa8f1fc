"""Releases of all four families in the wrappings that they and their trainers have: in, and the same outputs.

Each file goes through tools/convert_checkpoint.py to a run. The run's weights are the file's, bit for bit after the
cast to float32, and its model gives what a second, plain writing of the family gives for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.foreign.official_releases import State, release
from helpers.models.reference_dit import reference_dit
from helpers.models.reference_mmdit import reference_mmdit
from helpers.models.reference_pixart import reference_pixart
from helpers.models.reference_uvit import reference_uvit
from megadit.checkpoint.find import load_model
from megadit.cli import convert_checkpoint
from megadit.config import ModelConfig
from megadit.convert.conversion import convert
from megadit.convert.weight_sets import weights_file
from megadit.data.conditions import NULL_TEXT_FILE, load_conditions
from megadit.errors import UserError
from megadit.mup.example import example_conditioning, example_images

ROOT = Path(__file__).resolve().parents[2]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HINTS = ["--hint", "heads=2", "data.vae=null"]
ONLINE, AVERAGE = 1, 2  # seeds of the two sets of weights


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def adam(state: State) -> dict[str, Any]:
    """The optimizer's state, as torch writes it."""
    moments = {n: {"step": torch.tensor(5.0), "exp_avg": v, "exp_avg_sq": v} for n, v in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(range(len(state)))}]}


def dit_train(online: State, average: State) -> dict[str, Any]:
    """DiT's train.py."""
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, results_dir="results")
    return {"model": online, "ema": average, "opt": adam(online), "args": args}


def pixart_train(online: State, average: State) -> dict[str, Any]:
    """PixArt's diffusion/utils/checkpoint.py."""
    scheduler = {"last_epoch": 5, "_last_lr": [2e-5]}
    return {
        "state_dict": online,
        "state_dict_ema": average,
        "optimizer": adam(online),
        "scheduler": scheduler,
        "epoch": 5,
        "step": 1000,
    }


def lightning(online: State, average: State) -> dict[str, Any]:
    return {
        "epoch": 4,
        "global_step": 1000,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": {**below("net.", online), **below("net_ema.module.", average)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [adam(online)],
        "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"lr": 1e-4, "out": Path("runs")},
    }


def ema_pytorch(online: State, average: State) -> State:
    counters = {"initted": torch.tensor(True), "step": torch.tensor(5)}
    return {**below("online_model.", online), **below("ema_model.", average), **counters}


def single_file(online: State, average: State) -> State:
    """sd3_medium_incl_clips.safetensors, whose encoders and autoencoder stand beside the transformer."""
    return {
        **below("model.diffusion_model.", online),
        "first_stage_model.encoder.conv_in.weight": torch.ones(2, 3, 1, 1).half(),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(3).half(),
        "text_encoders.t5xxl.transformer.shared.weight": torch.ones(3, 2).half(),
    }


def fsdp(online: State, average: State) -> State:
    marks = ("blocks.0.", "blocks.1.", "mid_block.", "in_blocks.0.", "out_blocks.0.")
    named = {}
    for name, value in online.items():
        mark = next((mark for mark in marks if name.startswith(mark)), None)
        inner = name if mark is None else f"{mark}_checkpoint_wrapped_module.{name.removeprefix(mark)}"
        named[f"_fsdp_wrapped_module.{inner}"] = value
    return named


def plain(online: State, average: State) -> State:
    return online


def under(prefix: str, key: str | None = None) -> Callable[[State, State], Any]:
    return lambda online, average: below(prefix, online) if key is None else {key: below(prefix, online)}


# Family, file, its dtype, how it is wrapped, and the --ema that takes the averages.
FILES: list[tuple[str, str, torch.dtype, Callable[[State, State], Any], str | None]] = [
    ("dit", "DiT-XL-2-256x256.pt", FP32, plain, None),
    ("dit", "0400000.pt", FP32, dit_train, "ema"),
    ("dit", "compiled.pt", BF16, lambda o, a: dit_train(below("_orig_mod.module.", o), below("module.", a)), "ema"),
    ("dit", "lightning.ckpt", FP16, lightning, "net_ema"),
    ("dit", "ema.safetensors", FP16, ema_pytorch, "ema_model"),
    ("pixart", "PixArt-XL-2-256x256.pth", FP32, under("", "state_dict"), None),
    ("pixart", "epoch_5_step_1000.pth", FP16, pixart_train, "state_dict_ema"),
    ("pixart", "ddp.pth", BF16, lambda o, a: pixart_train(below("module.", o), below("module.", a)), "state_dict_ema"),
    ("pixart", "fsdp.pth", FP32, fsdp, None),
    ("uvit", "imagenet256_uvit_large.pth", FP32, plain, None),
    ("uvit", "half.pth", FP16, under("module."), None),
    ("uvit", "fsdp.safetensors", BF16, fsdp, None),
    ("uvit", "lightning.ckpt", FP32, lightning, "net_ema"),
    ("mmdit", "sd3_medium_incl_clips.safetensors", FP16, single_file, None),
    ("mmdit", "sd3_large.safetensors", BF16, plain, None),
    ("mmdit", "train.pt", FP32, dit_train, "ema"),
    ("mmdit", "compiled.pt", FP32, under("module._orig_mod.", "model"), None),
]  # fmt: skip


def reference(family: str, config: ModelConfig, state: State, x: Tensor, t: Tensor) -> Tensor:
    """What the family's formulas give for the file's weights, in float64."""
    w = {name: value.to(torch.float32).double() for name, value in state.items()}
    cond = example_conditioning(config, range(len(x)))
    if family == "dit":
        return reference_dit(config, w, x, t, cond.labels)
    if family == "uvit":
        w["pos_embed.weight"] = w.pop("pos_embed")
        return reference_uvit(config, w, x, t, cond.labels)
    if family == "mmdit":
        return reference_mmdit(config, w, x, t, cond)
    assert cond.text is not None
    return reference_pixart(config, w, x, t, cond.text, cond.text_mask)


def check(run: Path, family: str, state: State) -> None:
    """The run's weights are the file's, and its model gives the reference's outputs."""
    config, model = load_model(run)
    held = dict(model.named_parameters())
    fixed = {"pos_embed", "y_embedder.y_embedding"} - ({"pos_embed"} if family == "uvit" else set())
    expected = {
        ("pos_embed.weight" if name == "pos_embed" else name): v for name, v in state.items() if name not in fixed
    }
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name].to(torch.float32)) for name in held)
    if family == "pixart":
        text = load_conditions(run / NULL_TEXT_FILE)[0].text
        assert text is not None and torch.equal(text[0], state["y_embedder.y_embedding"].to(torch.float32))
    x, t = example_images(config.model, range(2)), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        output = model(x, t, example_conditioning(config.model, range(2)))
    torch.testing.assert_close(output.double(), reference(family, config.model, state, x, t), rtol=0, atol=2e-5)


def uvit_folder(folder: Path, online: State, average: State) -> None:
    """U-ViT's utils.py: one folder per checkpoint."""
    torch.save(online, folder / "nnet.pth")
    torch.save(average, folder / "nnet_ema.pth")
    torch.save(adam(online), folder / "optimizer.pth")
    torch.save({"last_epoch": 5}, folder / "lr_scheduler.pth")
    torch.save(500000, folder / "step.pth")


def accelerate_folder(folder: Path, online: State, average: State) -> None:
    """accelerate's save_state, of a model and its averages."""
    save_file(below("module.", online), folder / "model.safetensors")
    save_file(average, folder / "model_1.safetensors")
    torch.save(adam(online), folder / "optimizer.bin")
    torch.save({"last_epoch": 5}, folder / "scheduler.bin")
    torch.save([1, 2], folder / "random_states_0.pkl")
    torch.save({"decay": 0.9}, folder / "custom_checkpoint_0.pkl")


@pytest.mark.parametrize(
    ("family", "write", "names", "ema"),
    [
        ("uvit", uvit_folder, ("nnet.pth", "nnet_ema.pth"), "nnet_ema"),
        ("dit", accelerate_folder, ("model.safetensors", "model_1.safetensors"), "model_1"),
    ],
    ids=["uvit", "accelerate"],
)
def test_a_folder_of_a_trainer_comes_in(
    tmp_path: Path, capsys: Any, family: str, write: Any, names: tuple[str, str], ema: str
) -> None:
    online, average = release(family, ONLINE), release(family, AVERAGE)
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    write(folder, online, average)
    arguments = ["--from", f"official-{family}", "--to", "megadit", str(folder)]
    assert convert_checkpoint.main([*arguments, str(tmp_path / "run"), *HINTS]) == 0
    assert f"the weights in {names[0]} are taken; --ema {ema} takes those in {names[1]}" in capsys.readouterr().err
    check(tmp_path / "run", family, online)
    assert convert_checkpoint.main([*arguments, str(tmp_path / "average"), *HINTS, "--ema", ema]) == 0
    assert f"the weights in {names[1]} are taken" in capsys.readouterr().err
    check(tmp_path / "average", family, average)


@pytest.mark.parametrize("name", ["index.json", "state.json", "fragments"])
def test_a_run_that_was_cloned_without_git_lfs_says_so(tmp_path: Path, name: str) -> None:
    torch.save(release("dit", ONLINE), tmp_path / "x.pt")
    arguments = ["--from", "official-dit", "--to", "megadit", str(tmp_path / "x.pt"), str(tmp_path / "run"), *HINTS]
    assert convert_checkpoint.main(arguments) == 0
    file = next((tmp_path / "run/checkpoints/step-00000000").glob(f"{name}*"))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 27\n")
    with pytest.raises(UserError, match="it is a git-LFS pointer; run `git lfs pull`"):
        load_model(tmp_path / "run")


def test_shards_of_a_release_are_joined_by_their_index(tmp_path: Path) -> None:
    online = below("model.", release("dit", ONLINE))
    names, folder = list(online), tmp_path / "shards"
    folder.mkdir()
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: online[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, path in enumerate((folder, index)):
        run = tmp_path / str(number)
        assert convert_checkpoint.main(["--from", "official-dit", "--to", "megadit", str(path), str(run), *HINTS]) == 0
        check(run, "dit", release("dit", ONLINE))


@pytest.mark.parametrize("kind", ["safetensors", "fp32-state-dict"])
def test_averages_beside_the_weights_are_chosen_in_every_format(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.bin")
    online, average = release("uvit", ONLINE), release("uvit", AVERAGE)
    value = {**below("model.", online), **below("ema_model.module.", average)}
    save_file(value, file) if kind == "safetensors" else torch.save(value, file)
    for name, ema, expected in (("a", None, online), ("b", "ema_model", average)):
        out = tmp_path / f"{name}.safetensors"
        convert(kind, "safetensors", file, out, ema=ema)
        output = load_file(out)
        assert output.keys() == expected.keys() and all(torch.equal(output[key], expected[key]) for key in output)
    with pytest.raises(UserError, match="--ema: slow is not in .*; its weights stand under ema_model, model"):
        convert(kind, "safetensors", file, tmp_path / "none.safetensors", ema="slow")


@pytest.mark.parametrize("kind", ["safetensors", "fp32-state-dict", "deepspeed", "official-dit"])
def test_fsdps_folder_is_named_by_every_format(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/.metadata").touch()
    with pytest.raises(UserError, match="IN: '.*/in' .*is a checkpoint of torch.distributed.checkpoint .*dcp_to_torch"):
        convert(kind, "safetensors", tmp_path / "in", tmp_path / "out")


def test_fsdps_shards_are_joined_as_the_message_says(tmp_path: Path) -> None:
    """The remedy is run: what torch joins is read."""
    online = release("dit", ONLINE)
    checkpoint.save({"model": online, "step": 5}, checkpoint_id=tmp_path / "shards", no_dist=True)
    arguments = ["--from", "official-dit", "--to", "megadit"]
    with pytest.raises(UserError, match="FSDP's shards.*: python -m torch.distributed.checkpoint.format_utils dcp_to_"):
        convert_checkpoint.main([*arguments, str(tmp_path / "shards"), str(tmp_path / "run"), *HINTS])
    dcp_to_torch_save(tmp_path / "shards", tmp_path / "weights.pt")
    assert convert_checkpoint.main([*arguments, str(tmp_path / "weights.pt"), str(tmp_path / "run"), *HINTS]) == 0
    check(tmp_path / "run", "dit", online)


FOLDERS = {
    "diffusers": (
        ["model_index.json"],
        "is a folder of diffusers; .*--from diffusers",
    ),
    "lora": (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter .*merge it into its base model"),
    "deepspeed": (
        ["latest", "global_step5"],
        "is a checkpoint of DeepSpeed; .*--from deepspeed$",
    ),
    "zero": (
        ["zero_pp_rank_0_mp_rank_00_model_states.pt"],
        "of DeepSpeed; .*--from deepspeed$",
    ),
    "universal": (
        ["zero", "mp_rank_00_model_states.pt"],
        ".*--from deepspeed-universal",
    ),
    "megatron": (["latest_checkpointed_iteration.txt", "iter_0000005"], "is a checkpoint of Megatron, cut over"),
    "megatron rank": (["mp_rank_00"], "is a checkpoint of Megatron"),
    "run": (
        ["config.yaml", "checkpoints"],
        "is a run of megadit; .*--from megadit",
    ),
    "several": (["a.pt", "b.pt", "optimizer.pt"], "holds a.pt, b.pt; give the file that holds the model's weights"),
    "none": (["optimizer.pt", "notes.txt"], "holds no file of weights; give the file"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_something_else_is_named(tmp_path: Path, kind: str) -> None:
    names, message = FOLDERS[kind]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"IN: '{tmp_path}' .*{message}"):
        weights_file(tmp_path, None)


@pytest.mark.parametrize(("family", "name", "dtype", "wrap", "ema"), FILES, ids=[f"{f[0]}-{f[1]}" for f in FILES])
def test_a_release_comes_in(
    tmp_path: Path, capsys: Any, family: str, name: str, dtype: torch.dtype, wrap: Any, ema: str | None
) -> None:
    online, average = release(family, ONLINE, dtype), release(family, AVERAGE, dtype)
    value, file = wrap(online, average), tmp_path / name
    save_file(value, file) if name.endswith(".safetensors") else torch.save(value, file)
    arguments = ["--from", f"official-{family}", "--to", "megadit", str(file)]
    assert convert_checkpoint.main([*arguments, str(tmp_path / "run"), *HINTS]) == 0
    message = capsys.readouterr().err
    check(tmp_path / "run", family, online)
    assert ("they are float32 from here on" in message) == (dtype != FP32)
    if ema is not None:
        assert f"--ema {ema} takes those under" in message
        assert convert_checkpoint.main([*arguments, str(tmp_path / "average"), *HINTS, "--ema", ema]) == 0
        assert f"the weights under '{ema}" in capsys.readouterr().err
        check(tmp_path / "average", family, average)
    with pytest.raises(UserError, match="--ema: slow is not in "):
        convert_checkpoint.main([*arguments, str(tmp_path / "none"), *HINTS, "--ema", "slow"])
