"""U-ViT trains: as plain torch does under every ZeRO stage, with recomputation, through a resume, to its pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layouts.parity import WEIGHT_TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import layout_of, merge_weights, plain_torch_run, small_config, train_rank
from megadit.cli import sample
from megadit.config import RunConfig

STEPS = 5
TOLERANCE = 1e-5  # relative, float32

MODEL = {"family": "uvit", "depth": 2, "mlp": "gelu", "qkv_bias": False}


def uvit_config(**sections: dict[str, Any]) -> RunConfig:
    """The small digits run with a U-ViT; ``sections`` change keys."""
    base = small_config().model_dump()
    changed = base | {name: {**base[name], **values} for name, values in sections.items()}
    changed["model"] |= MODEL
    return RunConfig.model_validate(changed)


OBJECTIVES = {"flow": uvit_config(), "ddpm": uvit_config(objective={"kind": "ddpm"}, model={"learn_sigma": True})}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {kind: plain_torch_run(config, STEPS) for kind, config in OBJECTIVES.items()}


def on_layout(kind: str, stage: int, **train: Any) -> RunConfig:
    config = OBJECTIVES[kind]
    changes = {"micro_batch": 4, "steps": STEPS, **train}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"zero_stage": stage}),
            "train": config.train.model_copy(update=changes),
        }
    )


def assert_same(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for key in ("losses", "norms"):
        torch.testing.assert_close(
            torch.tensor(results[0][key]), torch.tensor(reference[key]), rtol=TOLERANCE, atol=0, msg=key
        )
    weights = merge_weights(results)
    assert weights.keys() == reference["weights"].keys()
    for name, value in reference["weights"].items():
        assert (weights[name] - value).norm() <= WEIGHT_TOLERANCE * value.norm().clamp_min(1e-6), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage", "how"),
    [
        ("flow", 0, "none"),
        ("ddpm", 1, "none"),
        ("flow", 2, "full"),
        ("ddpm", 3, "none"),
        ("flow", 3, "selective"),
    ],
)
def test_two_ranks_equal_plain_torch(
    expected: dict[str, dict[str, Any]], tmp_path: Path, kind: str, stage: int, how: str
) -> None:
    config = on_layout(kind, stage, activation_checkpointing=how)
    assert_same(run_ranks(2, train_rank, config, str(tmp_path)), expected[kind])


@pytest.mark.distributed
def test_a_resume_leaves_no_trace(tmp_path: Path) -> None:
    config = on_layout("flow", 2)
    straight = run_ranks(2, train_rank, config, str(tmp_path / "straight"))
    half = run_ranks(2, train_rank, config, str(tmp_path / "halves"), 2)
    resumed = run_ranks(2, train_rank, config, str(tmp_path / "halves"), STEPS, half[0]["saved"])
    assert half[0]["losses"] + resumed[0]["losses"] == straight[0]["losses"]
    weights, resumed = merge_weights(straight), merge_weights(resumed)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.distributed
def test_bf16_follows_float32(expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    results = run_ranks(2, train_rank, on_layout("flow", 1, precision="bf16"), str(tmp_path))
    losses = torch.tensor(results[0]["losses"])
    torch.testing.assert_close(losses, torch.tensor(expected["flow"]["losses"]), rtol=2e-2, atol=0)


def _whole_run(config: RunConfig, folder: str) -> int:
    """A whole run on one rank; its exit code."""
    from megadit.data import build_datasets
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    return pretrain(TrainingJob(config, ds_config, Path(folder), "auto", *build_datasets(config.data)))


@pytest.mark.distributed
def test_from_digits_to_pictures_of_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """30 steps: the loss falls, pictures are drawn of the moving average, and drawn again from the checkpoint."""
    from megadit.checkpoint.find import load_model

    config = uvit_config(
        train={"steps": 30, "log_every": 5, "validation_images": 20},
        ema={"decays": (0.9,)},
        sample={"weights": "0.9", "guidance": 2.0},
        optim={"lr": 2.0**-6},
    )
    assert run_ranks(1, _whole_run, config, str(tmp_path)) == [0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (tmp_path / "samples/step-00000030.png").stat().st_size > 0
    online, average = (dict(load_model(tmp_path, weights=name)[1].named_parameters()) for name in ("online", "0.9"))
    assert not torch.equal(online["mid_block.mlp.fc1.weight"], average["mid_block.mlp.fc1.weight"])

    assert sample.main([str(tmp_path), "--json", "--device", "cpu", "--out", str(tmp_path / "again.png")]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "0.9"
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "samples/step-00000030.png").read_bytes()
