"""PixArt and MMDiT train: as plain torch does under every ZeRO stage, with recomputation, through a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layouts.parity import WEIGHT_TOLERANCE, gap_of
from helpers.models.tiny_text import bert_folder
from helpers.ranks import run_ranks
from helpers.training import merge_weights, plain_torch_run, small_config, train_rank
from megadit.config import RunConfig

STEPS = 4
TOLERANCE = 1e-5  # relative, float32
MODELS: dict[str, dict[str, Any]] = {
    "pixart": {"text": {"dim": 16, "max_length": 8}},
    "mmdit": {"text": {"dim": 16, "max_length": 8, "pooled_dim": 16}, "qk_norm": "rms", "mlp": "swiglu"},
}


def text_config(family: str, kind: str, root: Path) -> RunConfig:
    """The small digits run, on their captions; half of these are dropped."""
    pooled = "same" if family == "mmdit" else "none"
    source = {"path": str(root / "bert"), "pooled": pooled, "cache": str(root / "cache")}
    return small_config(
        model={"family": family, "num_classes": 0, "learn_sigma": kind == "ddpm", **MODELS[family]},
        data={"name": "digits", "condition": "text", "text": source},
        objective={"kind": kind, "label_dropout": 0.5},
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[RunConfig, dict[str, Any]]]:
    """Configuration and plain torch's training of every family and objective."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("texts")
    bert_folder(root / "bert")
    configs = {(family, kind): text_config(family, kind, root) for family in MODELS for kind in ("flow", "ddpm")}
    return {key: (config, plain_torch_run(config, STEPS)) for key, config in configs.items()}


def on_layout(config: RunConfig, stage: int, **train: Any) -> RunConfig:
    changes = {"micro_batch": 4, "steps": STEPS, **train}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"zero_stage": stage}),
            "train": config.train.model_copy(update=changes),
        }
    )


@pytest.mark.distributed
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("kind", "stage", "how"),
    [("ddpm", 0, "none"), ("flow", 1, "none"), ("ddpm", 2, "full"), ("flow", 3, "selective"), ("ddpm", 3, "none")],
)
def test_two_ranks_equal_plain_torch(
    expected: dict[tuple[str, str], Any], tmp_path: Path, family: str, kind: str, stage: int, how: str
) -> None:
    config, reference = expected[family, kind]
    results = run_ranks(2, train_rank, on_layout(config, stage, activation_checkpointing=how), str(tmp_path))
    for key in ("losses", "norms"):
        torch.testing.assert_close(
            torch.tensor(results[0][key]), torch.tensor(reference[key]), rtol=TOLERANCE, atol=0, msg=key
        )
    weights = merge_weights(results)
    assert weights.keys() == reference["weights"].keys()
    gaps = {name: gap_of(name, weights[name], value) for name, value in reference["weights"].items()}
    worst = max(gaps, key=gaps.__getitem__)
    assert gaps[worst] <= WEIGHT_TOLERANCE, f"{worst}: {gaps[worst]:.1e}"


@pytest.mark.distributed
@pytest.mark.parametrize("family", MODELS)
def test_a_resume_leaves_no_trace(expected: dict[tuple[str, str], Any], tmp_path: Path, family: str) -> None:
    config = on_layout(expected[family, "flow"][0], 2)
    straight = run_ranks(2, train_rank, config, str(tmp_path / "straight"))
    half = run_ranks(2, train_rank, config, str(tmp_path / "halves"), 2)
    resumed = run_ranks(2, train_rank, config, str(tmp_path / "halves"), STEPS, half[0]["saved"])
    assert half[0]["losses"] + resumed[0]["losses"] == straight[0]["losses"]
    weights, resumed = merge_weights(straight), merge_weights(resumed)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
