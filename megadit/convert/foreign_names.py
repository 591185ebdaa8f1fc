"""Weights that are no whole model of megadit's families, recognized by their names, each refused with what to do.

Nothing but names and keys is looked at: adapters, quantized weights, FSDP's flat parameters, optimizers, Megatron's
files, averages without names, and the models of other programs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from megadit.errors import UserError

_BY_NAME: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(
            r"(?:^|\.)(?:lora|lora_[AB]|lora_(?:up|down|mid)|lora_embedding_[AB]|lora_magnitude_vector|dora_scale|"
            r"hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|ia3_l|base_layer)(?:\.|$)|^lora_"
        ),
        "is an adapter (LoRA or the like), which changes the weights of another file",
        "merge it into its base model in the program that made it (PEFT: merge_and_unload()) and give what that saves",
    ),
    (
        re.compile(
            r"(?:^|[._])(?:SCB|absmax|quant_map|quant_state|bitsandbytes__\w+|weight_format|qweight|qzeros|g_idx|scales|"
            r"weight_scale(?:_inv|_2)?|scale_weight|scale_input|input_scale|scaled_fp8|weight_packed|_packed_params|"
            r"zero_point)(?:\.|$)"
        ),
        "is quantized",
        "give the checkpoint that it was quantized from",
    ),
    (
        re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$"),
        "holds FSDP's flat parameters, which name nothing",
        "save it with FSDP's FULL_STATE_DICT",
    ),
)
_OTHER_MODELS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"^(?:transformer_blocks\.\d+\.|adaln_single\.|time_text_embed\.|pos_embed\.proj\.)"),
        "has the names of diffusers' classes",
        "give the folder that it lies in, with its config.json, by --from diffusers",
    ),
    (
        re.compile(r"(?:^|\.)(?:double_blocks|single_blocks|single_transformer_blocks)\.\d"),
        "is a model like Flux's, which is none of the families here",
        "give a DiT, PixArt-alpha, U-ViT or MMDiT",
    ),
    (
        re.compile(r"(?:^|\.)(?:input_blocks\.\d+\.\d+|down_blocks\.\d+\.resnets)\."),
        "is a convolutional U-Net, as of Stable Diffusion 1, 2 and XL, which is none of the families here",
        "give a DiT, PixArt-alpha, U-ViT or MMDiT",
    ),
    (
        re.compile(r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|conv_out|mid)\."),
        "is an autoencoder",
        "give the transformer's weights; data.vae.path takes an autoencoder's folder",
    ),
    (
        re.compile(r"^(?:text_model\.|shared\.weight$|encoder\.block\.\d)"),
        "is a text encoder",
        "give the transformer's weights; data.text.path takes a text encoder's folder",
    ),
)
_OPTIMIZER = {"state", "param_groups"}
_MEGATRON = {"checkpoint_version", "iteration"}
UNNAMED = "shadow_params"  # the averages of torch_ema and of diffusers' EMAModel: a list


def refuse_kinds(names: Collection[str], where: str) -> None:
    """Raise UserError where some of ``names`` say that the weights are not those of a whole model in floats."""
    for pattern, kind, remedy in _BY_NAME:
        name = next(filter(pattern.search, names), None)
        if name is not None:
            raise UserError(f"{where} {kind} ('{name}'); {remedy}")


def refuse_other_models(names: Collection[str], where: str) -> None:
    """Raise UserError where most names are those of a model that is known and is none of the families here."""
    refuse_kinds(names, where)
    for pattern, kind, remedy in _OTHER_MODELS:
        name = next(filter(pattern.search, names), None)
        if name is not None:
            raise UserError(f"{where} {kind} ('{name}'); {remedy}")


def refuse_files(values: Any, where: str) -> None:
    """Raise UserError for a file whose keys say that it holds no weights of a whole model."""
    if not isinstance(values, Mapping):
        return
    keys = values.keys()
    if keys >= _OPTIMIZER and "model" not in keys:
        raise UserError(f"{where} is an optimizer's state alone; give the file that holds the model's weights")
    if keys & _MEGATRON and isinstance(values.get("model"), Mapping) and keys & {"args", "rng_state", "rerun_state"}:
        raise UserError(
            f"{where} is a checkpoint of Megatron, cut over its ranks and with names of its own; convert it with the "
            "tools of the program that made it, to weights by the names of the model's authors"
        )
    if isinstance(values.get(UNNAMED), list):
        raise UserError(f"{where} {no_names(UNNAMED)}")


def origin_notes(values: Any) -> list[str]:
    """Notes on keys beside the weights: better weights are in other files, or the training was another than here."""
    if isinstance(values, Mapping) and "ds_version" in values:
        return [
            "this is one file of a DeepSpeed checkpoint; where it was trained in 16 bits, the float32 weights stand in "
            "the files beside it, and --from deepspeed reads the folder"
        ]
    args = values.get("args") if isinstance(values, Mapping) else None
    arguments = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    path = arguments.get("path_type")
    if not isinstance(path, str):
        return []
    return [
        f"its arguments say path_type {path[:20]}, as those of SiT and REPA do: it was trained by flow matching on "
        "times from 0 to 1, where the model here is given 0 to 1000; the weights are the file's, but no objective here "
        "draws from them as they were trained"
    ]


def no_names(key: str) -> str:
    """Why averages that are a list are not taken."""
    return (
        f"holds averages without names ('{key}' is a list in the order of a model's parameters); in the program that "
        "made it, copy them into the model (copy_to(model.parameters())) and save its state_dict()"
    )
