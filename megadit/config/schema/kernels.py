"""``kernels.*``: which implementation of a fused operation runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megadit.config.schema.section import Section

Implementation = Literal["auto", "fused", "reference"]


Attention = Literal["auto", "sdpa", "varlen", "flash-attn"]
LARGEST_FLASH_HEAD_DIM = 256


class KernelConfig(Section):
    """Which implementation of each fused operation runs: auto takes Triton's on a GPU, torch's elsewhere.

    ``attention``: how padding of texts is left out of attention. auto: varlen, where it works and activations are
    bf16 or fp16, else sdpa.
    """

    norm_modulate: Literal[Implementation, "apex"] = Field(
        "auto",
        description="gated residual, norm and modulation: auto, fused (Triton, on a GPU), reference (torch) or apex "
        "(NVIDIA apex's norm, where installed; the rest by torch)",
    )
    residual_across_blocks: bool | Literal["auto"] = Field(
        "auto",
        description="a block leaves its last residual to the first norm of the next, which adds it in the same pass: "
        "auto where the fused norm runs on a GPU and no block is recomputed (a recomputed block saves its inputs, of "
        "which there are then two per token instead of one); what pipeline stages send stays as it is",
    )
    swiglu: Implementation = Field(
        "auto", description="bias and SwiGLU's product of two halves, where model.mlp is swiglu"
    )
    noise: Implementation = Field(
        "auto", description="noise, its mixture with the images, and their losses: one kernel each"
    )
    qk_norm: Implementation = Field(
        "auto", description="RMSNorm of queries and keys (model.qk_norm), and MMDiT's streams in one sequence"
    )
    gelu: Implementation = Field("auto", description="bias and GELU, where model.mlp is gelu or gelu_tanh")
    attention: Attention = Field(
        "auto",
        description="auto, sdpa (a mask over padding of texts), varlen (torch's flash attention by lengths, without a "
        "mask) or flash-attn (the package, for all attention)",
    )
