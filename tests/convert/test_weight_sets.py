"""Names of trainers and wrappers: what is taken out of them, what is told, what is refused."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megadit.convert.parameter_names import plain_weights
from megadit.convert.weight_sets import weights_of
from megadit.errors import UserError

NAMES = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.scale_shift_table", "final_layer.linear.bias")
WHERE = "'x.pt'"


def model(value: float, prefix: str = "", names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.full((1,), value) for name in names}


def values_of(state: dict[str, Tensor]) -> set[float]:
    """What the model's tensors hold; they must be the model's, in the order of the file."""
    assert tuple(state) == NAMES
    return {value.item() for value in state.values()}


def inside(part: str) -> dict[str, Tensor]:
    """A wrapper around the model, its blocks and their layers."""
    names = (f"{part}.{name}".replace("blocks.0.", f"blocks.0.{part}.") for name in NAMES)
    return {name: torch.full((1,), 1.0) for name in names}


COUNTER = torch.zeros(1, dtype=torch.int64)
# The file, what is said of it, and --ema with what it takes instead (2.0 everywhere).
FILES: dict[str, tuple[Any, str, str | None]] = {
    "plain": (model(1), "", None),
    "ddp": (model(1, "module."), "'module.' before all names was left out", None),
    "compiled": (model(1, "_orig_mod."), "'_orig_mod.' before all names was left out", None),
    "ddp of compiled": (model(1, "module._orig_mod."), "'_orig_mod.' before all names", None),
    "compiled ddp": (model(1, "_orig_mod.module."), "'module.' before all names", None),
    "fsdp": (inside("_fsdp_wrapped_module"), "'_fsdp_wrapped_module.' before all names", None),
    "checkpointed blocks": (
        {name.replace("blocks.0", "blocks.0._checkpoint_wrapped_module"): value for name, value in model(1).items()},
        "'_checkpoint_wrapped_module.' inside names was left out",
        None,
    ),
    "module in the middle": (
        {name.replace("blocks.0", "blocks.0.module"): value for name, value in model(1).items()},
        "'module.' inside names was left out",
        None,
    ),
    "attribute": (model(1, "net."), "'net.' before all names was left out", None),
    "any attribute": (model(1, "my_denoiser.inner."), "'my_denoiser.inner.' before all names was left out", None),
    "lightning": (
        {
            "pytorch-lightning_version": "2.5.0",
            "epoch": 3,
            "global_step": 9,
            "state_dict": {**model(1, "model."), **model(2, "ema_model."), "lpips.lin0.weight": torch.ones(1)},
            "callbacks": {"ModelCheckpoint": {"best": torch.ones(())}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}],
            "hyper_parameters": {"lr": 1e-4},
        },
        "the weights under 'model.' are taken; --ema ema_model takes those under 'ema_model.'",
        "ema_model",
    ),
    "lightning average": (
        {
            "current_model_state": model(1, "model."),
            "state_dict": model(2, "model."),
            "averaging_state": {"n": COUNTER},
        },
        "under 'current_model_state' are taken; --ema state_dict takes those under 'state_dict'",
        "state_dict",
    ),
    "dit": (
        {"model": model(1, "module."), "ema": model(2), "opt": {"state": {}, "param_groups": []}, "args": None},
        "the weights under 'model' are taken; --ema ema takes those under 'ema'",
        "ema",
    ),
    "pixart": (
        {"state_dict": model(1), "state_dict_ema": model(2), "epoch": 3, "optimizer": {"state": {}}},
        "the weights under 'state_dict' are taken; --ema state_dict_ema takes those under 'state_dict_ema'",
        "state_dict_ema",
    ),
    "ema-pytorch": (
        {**model(1, "online_model."), **model(2, "ema_model."), "initted": COUNTER, "step": COUNTER},
        "'online_model.' are taken; --ema ema_model takes .* 2 tensors of something else are left out .*initted, step",
        "ema_model",
    ),
    "ema-pytorch alone": (
        {**model(1, "ema_model.module."), "initted": COUNTER, "step": COUNTER},
        "the weights under 'ema_model.' are taken",
        None,
    ),
    "torch average": (
        {**model(1, "module."), "n_averaged": COUNTER},
        "'module.' before all names was left out n_averaged beside the weights: left out; it tells that .* an average",
        None,
    ),
    "bare and average": ({**model(2, "ema."), **model(1)}, "without a prefix are taken; --ema ema takes", "ema"),
    "single file": (
        {
            **model(1, "model.diffusion_model."),
            "first_stage_model.encoder.conv_in.weight": torch.ones(1),
            "text_encoders.t5xxl.shared.weight": torch.ones(1),
            "text_encoders.t5xxl.scaled_fp8": torch.ones(1),
        },
        "3 tensors of something else are left out .under first_stage_model, text_encoders.",
        None,
    ),
    "repa": (
        {"ema": model(2), "model": {**model(1), "projectors.0.0.weight": torch.ones(1)}, "steps": 7},
        "the projector of REPA .* is left out",
        "ema",
    ),
    "torch_ema": (
        {"model": model(1), "ema": {"decay": 0.9, "shadow_params": [torch.ones(1)]}},
        "the averages under 'ema' are left out, since they carry no names",
        None,
    ),
    "deepspeed": (
        {"module": model(1), "global_steps": 3, "optimizer": None, "ds_version": "0.19.8"},
        "under 'module' are taken this is one file of a DeepSpeed checkpoint; .*--from deepspeed reads the folder",
        None,
    ),
    "one unusual key": ({"my_weights": model(1), "step": 3}, "the weights under 'my_weights' are taken", None),
    "two levels": (
        {"state": {"denoiser": model(1), "denoiser_ema": model(2)}},
        "under 'state.denoiser' are taken; --ema state.denoiser_ema takes",
        "state.denoiser_ema",
    ),
    "notes beside": ({**model(1), "epoch": 7}, "epoch beside the weights: left out", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_wrapping_is_taken_off_and_told(kind: str) -> None:
    values, sentence, average = FILES[kind]
    state, notes = weights_of(values, WHERE, None, "dit")
    assert values_of(state) == {1.0}
    assert re.search(sentence, " ".join(notes)) and bool(notes) == bool(sentence)
    if average is not None:
        state, notes = weights_of(values, WHERE, average, "dit")
        assert values_of(state) == {2.0} and "are taken" in " ".join(notes)
    with pytest.raises(UserError, match="--ema: slow is not in 'x.pt'; "):
        weights_of(values, WHERE, "slow", "dit")


REFUSED: dict[str, tuple[Any, str]] = {
    "collision": ({**model(1, "module."), **model(2)}, "'module.x_embedder.* and 'x_embedder.* are the same parameter"),
    "two models": ({**model(1, "a."), **model(2, "b.")}, r"holds several models \(under a., b.\); name .* by --ema"),
    "two sets": ({"a": model(1), "b": model(2)}, r"several sets of weights \(under a, b\); name .* by --ema"),
    "optimizer": ({"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, "is an optimizer's state alone"),
    "moments": (
        {"epoch": 1, "optimizer": {"exp_avg": {"layers.0.weight": torch.ones(1)}}},
        "holds epoch, optimizer and no weights by name; give the checkpoint of a model",
    ),
    "nothing": ({"opt": {}, "step": 5}, "holds opt, step and no weights by name"),
    "no keys": ({}, "holds nothing and no weights by name"),
    "a tensor": (torch.ones(1), "holds a tensor and no weights by name"),
    "a list": ([torch.ones(1)], "holds list and no weights by name"),
    "unnamed": ({"decay": 0.9, "shadow_params": [torch.ones(1)]}, "holds averages without names .'shadow_params'"),
    "unnamed below a key": ({"ema": {"shadow_params": [torch.ones(1)]}}, "without names .'ema.shadow_params'"),
    "lora": ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(1)}, "is an adapter .*merge it into"),
    "unmerged": (
        {**model(1, "base_model.model."), "base_model.model.blocks.0.attn.qkv.lora_B.default.weight": torch.ones(1)},
        "is an adapter .LoRA or the like",
    ),
    "kohya": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(1)}, "is an adapter"),
    "bitsandbytes": (
        {**model(1), "blocks.0.attn.qkv.weight.quant_state.bitsandbytes__nf4": torch.ones(1)},
        "is quantized .* give the checkpoint that it was quantized from",
    ),
    "int8": ({**model(1), "blocks.0.attn.qkv.SCB": torch.ones(1)}, "is quantized"),
    "fp8": ({**model(1), "blocks.0.attn.qkv.scale_weight": torch.ones(1)}, "is quantized"),
    "fsdp flat": ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "FSDP's flat parameters.*FULL_STATE_DICT"),
    "zero-3": ({"module": {name: torch.empty(0) for name in NAMES}}, "no values for .*--from deepspeed"),
    "megatron": (
        {"args": None, "checkpoint_version": 3.0, "iteration": 5, "model": {"decoder": {"w": torch.ones(1)}}},
        "is a checkpoint of Megatron, cut over its ranks",
    ),
    "diffusers": ({"transformer_blocks.0.norm1.linear.weight": torch.ones(1)}, "names of diffusers.*--from diffusers"),
    "unet": ({"model.diffusion_model.input_blocks.1.0.in_layers.0.weight": torch.ones(1)}, "a convolutional U-Net"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, "is a model like Flux's"),
    "vae": ({"encoder.conv_in.weight": torch.ones(1)}, "is an autoencoder"),
    "text encoder": ({"text_model.embeddings.position_embedding.weight": torch.ones(1)}, "is a text encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_model_is_refused_by_what_it_is(kind: str) -> None:
    values, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=f"^IN: {sentence}" if kind == "collision" else f"^IN: 'x.pt' .*{sentence}"):
        weights_of(values, WHERE, None, "dit")


def test_what_the_arguments_tell_is_said() -> None:
    for args in (argparse.Namespace(path_type="Linear"), {"path_type": "Linear"}):
        _, notes = weights_of({"model": model(1), "args": args}, WHERE, None, "dit")
        assert any("path_type Linear, as those of SiT and REPA" in note for note in notes)


def test_averages_without_names_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"holds averages without names \('ema.shadow_params' is a list"):
        weights_of(FILES["torch_ema"][0], WHERE, "ema", "dit")


@pytest.mark.parametrize("keys", [("ema", "model_ema"), ("model_ema", "ema")])
def test_of_two_averages_the_usual_key_is_taken_in_whatever_order_they_stand(keys: tuple[str, str]) -> None:
    averages = {"ema": model(1), "model_ema": model(2)}
    state, notes = weights_of({key: averages[key] for key in keys}, WHERE, None, "dit")
    assert values_of(state) == {1.0}
    assert "the weights under 'ema' are taken; --ema model_ema takes those under 'model_ema'" in notes


def test_the_family_decides_which_of_two_models_is_meant() -> None:
    """REPA's encoders are Vision Transformers, whose names are U-ViT's."""
    both = {**model(1, "model."), "encoder.patch_embed.proj.weight": torch.ones(1)}
    assert values_of(weights_of(both, WHERE, None, "dit")[0]) == {1.0}
    with pytest.raises(UserError, match=r"several models \(under encoder., model.\)"):
        weights_of(both, WHERE)


def test_names_of_a_model_that_is_not_known_stay_but_for_wrappers() -> None:
    state = {"model.layers.0.weight": torch.ones(1), "model.module.bias": torch.ones(1)}
    assert plain_weights(state, WHERE)[0].keys() == state.keys()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    assert plain_weights(wrapped, WHERE)[0].keys() == state.keys()
    compiled = {f"model._orig_mod.{name}": value for name, value in state.items()}
    assert list(plain_weights(compiled, WHERE)[0]) == [f"model.{name}" for name in state]
