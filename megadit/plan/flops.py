"""FLOPs of a model, counted on the meta device, and dense peak rates of the usual accelerators."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from megadit.config import ModelConfig, RunConfig
from megadit.mup.example import example_conditioning

# Dense peak in FLOP/s, from the vendors' data sheets: (bf16 or fp16, tf32, fp32). A V100 has no TF32.
_PEAKS = {
    "H200": (989e12, 494.7e12, 67e12),
    "H100": (989e12, 494.7e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "V100": (125e12, 15.7e12, 15.7e12),
}


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of one image's forward pass, as ``stage_flops`` counts them."""
    return sum(stage_flops(config))


def training_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of ``steps`` steps of a run: three forward passes (forward and backward) per image."""
    return 3.0 * forward_flops(config.model) * config.train.global_batch * steps


def stage_flops(config: ModelConfig) -> list[int]:
    """FLOPs of one image's forward pass by stage of the model (``StagedModel.stages``), embedding and final layer too.

    A multiply-add counts two, by torch's FlopCounterMode on meta tensors. The REPA projector counts with the block that
    it reads; the encoder of its targets does not.
    """
    from megadit.models import build_model

    # Without gradients: the counter cannot hook modules that give their parameter out, as gains of heads are.
    model = build_model(config, device="meta").requires_grad_(False)
    x = torch.empty(1, config.in_channels, config.input_size, config.input_size, device="meta")
    stage_io = model.packed_inputs(x, torch.empty(1, device="meta"), example_conditioning(config, [0]).to("meta"))
    costs, blocks = [], 0
    for stage in model.stages():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            stage_io = stage(stage_io)
            blocks += stage.is_block
            if model.repa is not None and stage.is_block and blocks == model.repa_block:
                model.project_tokens(stage_io[0])
        costs.append(int(counter.get_total_flops()))
    return costs


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name, None where it is not known (CPUs among them).

    precision: fp32, tf32, bf16, fp16, or fp8, whose peak is bf16's: attention and much else stay in it.
    """
    for name, (half, tf32, single) in _PEAKS.items():
        if name in device_name:
            return {"fp32": single, "tf32": tf32}.get(precision, half)
    return None
