"""What a coordinate check trains: widths, steps, seeds, and the model at each width. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megadit.config.schema.model import ModelConfig
from megadit.errors import UserError
from megadit.files.paths import PNG, check_output


@dataclass(frozen=True)
class CoordPlan:
    """Which models to train and for how long: ``steps`` optimizer steps of ``batch`` samples, ``seeds`` starts each.

    With a zero readout and zero gates the gradient needs three steps to reach the body: take five or more.
    """

    widths: tuple[int, ...]
    steps: int = 6
    seeds: int = 2
    batch: int = 16

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 3 or min(self.widths) < 1:
            raise UserError(
                f"--widths {','.join(map(str, self.widths))}: a slope needs at least three different widths"
            )
        if self.steps < 5:
            raise UserError(f"--steps {self.steps}: the gradient reaches the body after three steps; take at least 5")
        if self.seeds < 1 or self.batch < 1:
            raise UserError(f"--seeds {self.seeds}, --batch {self.batch}: both must be at least 1")


def at_width(model: ModelConfig, width: int, parametrization: str, widths: tuple[int, ...]) -> ModelConfig:
    """``model`` at another width: same head_dim (heads scale), same base width (the smallest of ``widths`` if none).

    Attention and norms stay in the model's own precision: fp32 would round the check's float64.

    Raises:
        UserError: head_dim does not divide the width, or positions do not fit it.
    """
    head_dim = model.head_channels
    if width % head_dim or width % 4:
        raise UserError(
            f"--widths {width}: not a multiple of 4 and of head_dim {head_dim}, which stays fixed as width grows; "
            f"take multiples of {head_dim}, or set model.head_dim and model.heads=null"
        )
    base_width = model.base_width or min(widths)
    changes = {
        "width": width,
        "heads": None,
        "head_dim": head_dim,
        "parametrization": parametrization,
        "base_width": base_width if parametrization == "mup" else None,
        "attention_precision": "auto",
        "norm_precision": "auto",
    }
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def check_shares(model: ModelConfig, plan: CoordPlan, ranks: int) -> None:
    """Whether ``ranks`` tensor-parallel ranks can share the layers of every width.

    Raises:
        UserError: they do not divide the heads or the hidden channels of the MLP of one.
    """
    for width in plan.widths:
        config = at_width(model, width, model.parametrization, plan.widths)
        for part, count in (("heads", config.num_heads), ("hidden channels", int(width * config.mlp_ratio))):
            if count % ranks:
                raise UserError(
                    f"--tp {ranks}: does not divide the {count} {part} of width {width}; take another, or other widths"
                )


def check_report_folder(folder: Path) -> None:
    """Raise UserError for a file in ``folder`` that a report would replace and that is of no earlier one."""
    check_output(folder / "coords.csv", "--out", "table of a coordinate check", (b"width,seed,step",))
    check_output(folder / "verdict.json", "--out", "verdict of a coordinate check", (b'"verdict"',))
    check_output(folder / "coord_check.png", "--out", "PNG picture", PNG)
