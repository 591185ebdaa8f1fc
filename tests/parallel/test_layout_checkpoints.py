"""A checkpoint of eight ranks (tensor 2, pipeline 2, data 2): resumed in other layouts, sampled, exported, printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.layouts.matrix import matrix_config
from helpers.layouts.parity import TOLERANCE, WEIGHT_TOLERANCE, gap_of
from helpers.ranks import run_ranks
from helpers.training import merge_weights, train_rank
from megadit.checkpoint.find import load_model
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.read import StoredCheckpoint
from megadit.cli import convert_checkpoint, inspect_checkpoint, sample

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
HALF = 3


class EightRankRun:
    """A text-conditional MMDiT with REPA: half of its run by eight ranks, and all of it by one."""

    def __init__(self, root: Path) -> None:
        self.root, self.run_dir = root, root / "spread"
        parallel = {"tensor": 2, "pipeline": 2}
        self.results = run_ranks(8, train_rank, self.config(8, **parallel), str(self.run_dir), HALF, timeout=280)
        [self.single_process] = run_ranks(1, train_rank, self.config(1), str(root / "alone"), timeout=280)

    def config(self, world: int, **parallel: Any) -> Any:
        return matrix_config("mmdit", self.root, True, world=world, **parallel)


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory: pytest.TempPathFactory) -> EightRankRun:
    return EightRankRun(tmp_path_factory.mktemp("spread"))


OTHERS: list[Any] = [
    (4, {"tensor": 2, "zero_stage": 3}),
    (1, {}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (2, {"zero_stage": 2}),
            (4, {"tensor": 4}),
            (4, {"pipeline": 4}),
            (8, {"tensor": 2, "sequence": True, "pipeline": 2}),
        ]
    ),
]


@pytest.mark.parametrize(("world", "parallel"), OTHERS, ids=lambda value: str(value).replace(" ", ""))
def test_other_layouts_go_on(eight_ranks: EightRankRun, tmp_path: Path, world: int, parallel: dict[str, Any]) -> None:
    config = eight_ranks.config(world, **parallel)
    rest = run_ranks(world, train_rank, config, str(tmp_path), None, eight_ranks.results[0]["saved"], timeout=280)
    for result in rest:
        for key in ("losses", "norms"):
            assert result[key] == pytest.approx(eight_ranks.single_process[key][HALF:], rel=TOLERANCE), key
    for kind in ("pieces", "exp_avg", "ema/0.9"):
        resumed, uninterrupted = merge_weights(rest, kind), merge_weights([eight_ranks.single_process], kind)
        assert resumed.keys() == uninterrupted.keys()
        distances = {name: gap_of(name, resumed[name], uninterrupted[name]) for name in uninterrupted}
        # REPA's cosine cancels in some biases of the timestep, where the rounding of Adam's first steps stays.
        assert max(distances.values()) <= WEIGHT_TOLERANCE, (kind, max(distances, key=distances.__getitem__))


def test_every_element_is_stored_once_and_told(eight_ranks: EightRankRun, capsys: pytest.CaptureFixture[str]) -> None:
    stored = StoredCheckpoint(eight_ranks.run_dir / "checkpoints" / "step-00000003")
    assert verify(stored) == []
    elements = sum(fragment.stop - fragment.start for fragment in stored.index.fragments if fragment.kind == "weights")
    assert elements == sum(torch.Size(shape).numel() for shape in stored.parameters.values())
    assert stored.parameters.keys() == merge_weights([eight_ranks.single_process]).keys()
    assert inspect_checkpoint.main([str(eight_ranks.run_dir)]) == 0
    assert "written by 8 rank(s) (tensor 2 x pipeline 2 x data 2) at ZeRO stage 1" in capsys.readouterr().out


def test_its_weights_go_elsewhere_whole(eight_ranks: EightRankRun, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    arguments = ["--from", "megadit", "--to", "safetensors", str(eight_ranks.run_dir), str(target)]
    assert convert_checkpoint.main(arguments) == 0
    expected, exported = merge_weights(eight_ranks.results), load_file(target)
    _, model = load_model(eight_ranks.run_dir)
    for name, p in model.named_parameters():
        assert torch.equal(exported[name].flatten(), expected[name]) and torch.equal(p.flatten(), expected[name]), name


def test_it_draws(eight_ranks: EightRankRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    arguments = [str(eight_ranks.run_dir), "--prompt", "the handwritten digit seven", "--count", "2", "--steps", "2"]
    assert sample.main([*arguments, "--json", "--device", "cpu", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 2
    with Image.open(out) as picture:
        assert picture.width >= 16
