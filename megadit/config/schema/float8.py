"""``train.fp8.*``: how the matrix products of linear layers run under ``train.precision: fp8``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megadit.config.schema.section import Section


class Float8Config(Section):
    """FP8 products of the blocks' linear layers, scaled by the present magnitudes of what they multiply."""

    backend: Literal["torch", "transformer-engine"] = Field(
        "torch", description="torch: torch._scaled_mm; transformer-engine: te.Linear, if installed, on one tensor rank"
    )
    scaling: Literal["tensor", "row", "block"] = Field(
        "tensor",
        description="what shares a scale: tensor: a matrix; row: a row (torch); block: 128 x 128 weights, 128 channels "
        "of a token (transformer-engine)",
    )
    bf16_layers: tuple[str, ...] = Field(
        (), description='names of layers that stay in bf16, with wildcards: ["blocks.0.*", "*.attn.proj"]'
    )


def float8_problem(fp8: Float8Config, *, tensor: int, compiled: bool, zero_stage: int | None) -> str | None:
    """Why the keys do not go together under ``train.precision: fp8``, as one sentence; None if they do."""
    possible = ("tensor", "row") if fp8.backend == "torch" else ("tensor", "block")
    if fp8.scaling not in possible:
        return (
            f"train.fp8.scaling: {fp8.scaling} is not done by train.fp8.backend {fp8.backend}; set it to "
            f"{' or '.join(possible)}"
        )
    if fp8.backend == "torch":
        return None
    for key, value, clashes, reason in (
        ("parallel.tensor", tensor, tensor > 1, "whose ranks would not agree on the scales of what they share"),
        ("parallel.zero_stage", zero_stage, zero_stage == 3, "whose weights its modules would keep copies of"),
        ("train.compile", "true", compiled, "whose graph its modules cut"),
    ):
        if clashes:
            return (
                f"train.fp8.backend: transformer-engine does not go with {key} {value}, {reason}; set "
                "train.fp8.backend=torch"
            )
    return None
