"""Every family on every kind of layout: which runs are made, and how far each is from the run of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from helpers.layouts.parity import gap_of
from helpers.models.tiny_text import bert_folder
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config import RunConfig

STEPS = 5
FAMILIES = ("dit", "pixart", "uvit", "mmdit")
_WIDE = {"width": 64, "heads": 4, "input_size": 8}
_TEXT = {"num_classes": 0, "text": {"dim": 16, "max_length": 6, "pooled_dim": 0}}
# Parts that start at zero are drawn where a family has a way to, so that every gradient counts from the first step.
_MODELS: dict[str, dict[str, Any]] = {
    "dit": {**_WIDE, "depth": 3, "qk_norm": "rms", "mlp": "swiglu"},
    "pixart": {"family": "pixart", **_WIDE, **_TEXT, "depth": 3, "adaln_init": "fan_in"},
    "uvit": {"family": "uvit", **_WIDE, "depth": 4, "mlp": "gelu", "qkv_bias": False},
    "mmdit": {
        "family": "mmdit",
        **_WIDE,
        **_TEXT,
        "depth": 3,
        "mlp": "swiglu",
        "qk_norm": "rms",
        "adaln_init": "fan_in",
    },
}
# With 3, the seed of the others, one element of a bias of U-ViT has a first gradient that cancels to rounding, which
# Adam makes as large as a step: 1e-5 of that bias, where all its other elements agree within 3e-7.
_SEEDS = {"uvit": 4}
_REPA = {"block": 2, "feature_dim": 112, "hidden": 48}

# name -> ranks, parallel.*, with REPA and clipping per group, recomputation
Layout = tuple[int, dict[str, Any], bool, str]
LAYOUTS: dict[str, Layout] = {
    "tp2": (2, {"tensor": 2, "zero_stage": 0}, False, "none"),
    "tp4": (4, {"tensor": 4}, False, "full"),
    "pp2": (2, {"pipeline": 2}, True, "none"),
    "pp4": (4, {"pipeline": 4}, True, "none"),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, True, "selective"),
    "tp2 dp2 zero1": (4, {"tensor": 2, "zero_stage": 1}, True, "none"),
    "tp2 dp2 zero2": (4, {"tensor": 2, "zero_stage": 2}, False, "selective"),
    "tp2 dp2 zero3": (4, {"tensor": 2, "zero_stage": 3}, True, "none"),
    "pp2 dp2 zero1": (4, {"pipeline": 2, "zero_stage": 1}, False, "full"),
    "tp2 sequence": (2, {"tensor": 2, "sequence": True}, True, "selective"),
    "tp2 sequence pp2 dp2": (8, {"tensor": 2, "sequence": True, "pipeline": 2}, True, "none"),
    "tp2 pp2 dp2": (8, {"tensor": 2, "pipeline": 2}, False, "none"),
}
# Of these layouts blocks leave their last residual to the next, which the run of one process does not.
ACROSS_BLOCKS = frozenset({"tp4", "pp2", "tp2 pp2", "tp2 dp2 zero1", "tp2 dp2 zero3", "tp2 sequence"})


def matrix_config(
    family: str, root: Path, full: bool, recompute: str = "none", *, across_blocks: bool = False, **parallel: Any
) -> RunConfig:
    """Digits by class or by caption, four micro batches a replica; ``full``: with REPA, and clipping per group."""
    model, data, objective = dict(_MODELS[family]), {"name": "digits"}, {"kind": "flow"}
    if "text" in model:
        source = {"path": str(bert_folder(root / "bert")), "cache": str(root / "cache")}
        data |= {"condition": "text", "text": source}
    if full:
        model["repa"] = _REPA
        data["features"] = {"image_size": 32, "cache": str(root / "features")}
        objective["repa_weight"] = 0.5
    world = parallel.pop("world", 1)
    replicas = world // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    clip = {"mode": "per_group", "value": 0.5} if full else {"value": 0.5}
    return small_config(
        model=model,
        data=data,
        objective=objective,
        optim={"clip": clip},
        parallel=parallel,
        kernels={"residual_across_blocks": across_blocks},
        ema={"decays": (0.9,)},
        train={
            "micro_batch": 4 // replicas,
            "steps": STEPS,
            "activation_checkpointing": recompute,
            "seed": _SEEDS.get(family, 3),
        },
    )


class LayoutRuns:
    """Runs, each family's in one process when it is first needed; ``root`` takes their files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @functools.cache  # noqa: B019 - lives as long as the tests of one module
    def single_process(self, family: str, full: bool) -> dict[str, Any]:
        """The run of one process."""
        folder = self._folder(family) / f"alone-{full}"
        [result] = run_ranks(1, train_rank, matrix_config(family, self._folder(family), full), str(folder), timeout=400)
        outcome: dict[str, Any] = result
        return outcome

    def on_layout(self, family: str, layout: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Results of all ranks of a layout, and that of one process."""
        world, parallel, full, recompute = LAYOUTS[layout]
        across = layout in ACROSS_BLOCKS
        config = matrix_config(
            family, self._folder(family), full, recompute, across_blocks=across, world=world, **parallel
        )
        folder = self._folder(family) / layout.replace(" ", "-")
        return run_ranks(world, train_rank, config, str(folder), timeout=400), self.single_process(family, full)

    def _folder(self, family: str) -> Path:
        path = self._root / family
        path.mkdir(parents=True, exist_ok=True)
        return path


def gaps(results: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference over all ranks, steps and parameters, by kind.

    ``gradients`` is of Adam's first moment, the mean of all steps' gradients after clipping.
    """
    measured = {
        "loss": max(_relative(result["losses"], expected["losses"]) for result in results),
        "norm": max(_relative(result["norms"], expected["norms"]) for result in results),
        "norms by role": max(
            _relative(
                [norms[role] for norms in result["role_norms"]], [norms[role] for norms in expected["role_norms"]]
            )
            for result in results
            for role in expected["role_norms"][0]
        ),
    }
    kinds = {"gradients": "exp_avg", "weights": "pieces", "average": "ema/0.9"}
    for quantity, kind in kinds.items():
        values, reference = merge_weights(results, kind), merge_weights([expected], kind)
        assert values.keys() == reference.keys(), values.keys() ^ reference.keys()
        measured[quantity] = max(gap_of(name, values[name], reference[name]) for name in reference)
    return measured


def _relative(values: list[float], expected: list[float]) -> float:
    # Behind a readout that starts at zero the first norms are zero.
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(values, expected, strict=True))


def diverged_replicas(results: list[dict[str, Any]], layout: str) -> list[str]:
    """Parameters that every tensor-parallel rank holds whole and whose weights are not the same bits on all of them."""
    world, parallel, _, _ = LAYOUTS[layout]
    size = parallel.get("tensor", 1)
    shares = {piece[0] for result in results for piece in result["pieces"] if piece[-1] is not None}
    names = []
    for first in range(0, world, size):
        for peer in results[first + 1 : first + size]:
            for name, weights in results[first]["working"].items():
                if name not in shares and not torch.equal(weights, peer["working"][name]):
                    names.append(name)
    return names
