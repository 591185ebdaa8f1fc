"""Pipeline-parallel runs train, average, save and validate what one process does."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.layouts.parity import STEPS, TOLERANCE, assert_same_training, config_of, reference_run, run_single_process
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, train_on, train_rank
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.read import StoredCheckpoint


@pytest.fixture(scope="module")
def reference():
    return reference_run()


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    return run_single_process(str(tmp_path_factory.mktemp("alone")))


LAYOUTS = [
    (2, {"pipeline": 2}),
    (4, {"pipeline": 2, "tensor": 2}),
    *(
        pytest.param(world, parallel, marks=pytest.mark.slow)
        for world, parallel in [
            (4, {"pipeline": 2}),
            (4, {"pipeline": 4}),
            (4, {"pipeline": 2, "tensor": 2, "sequence": True}),
            (8, {"pipeline": 2, "tensor": 2}),
        ]
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_stages_train_what_one_rank_does(reference, single_process, tmp_path, world, parallel):
    results = run_ranks(world, train_rank, config_of(**parallel), str(tmp_path))
    assert_same_training(results, reference, single_process)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, {"pipeline": 2}), (2, {"tensor": 2, "zero_stage": 2})), ((1, {}), (4, {"pipeline": 2, "tensor": 2}))],
    ids=["stages-to-shares", "alone-to-both"],
)
def test_a_run_goes_on_in_another_layout(reference, single_process, tmp_path, before, after):
    (first, parallel), (second, other) = before, after
    half = run_ranks(first, train_rank, config_of(**parallel), str(tmp_path), 3)
    stored = StoredCheckpoint(tmp_path / "checkpoints" / "step-00000003")
    assert verify(stored) == []
    rest = run_ranks(second, train_rank, config_of(**other), str(tmp_path), None, half[0]["saved"])
    assert_same_training(rest, reference, single_process, skip=3)


def validated(config, folder):
    from megadit.train.pictures import draw_samples
    from megadit.train.validation import validation_losses

    run = assemble_rank(config, folder)
    first = train_on(run, 2)
    losses = {weights: validation_losses(run, weights)["loss"] for weights in ("online", "0.9")}
    picture = draw_samples(run)
    more = train_on(run, 3)  # training goes on after an evaluation
    pixels = np.asarray(Image.open(picture), dtype=np.int16) if picture is not None else None
    return [r["loss"] for r in first + more], losses, pixels


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel"), [(2, {"tensor": 2, "sequence": True}), (4, {"pipeline": 2, "tensor": 2})], ids=["tp", "pp"]
)
def test_validation_and_pictures_are_those_of_one_rank(tmp_path, world, parallel):
    train = {"validation_images": 8}
    [(losses, expected, pixels)] = run_ranks(1, validated, config_of(train), str(tmp_path / "one"))
    results = run_ranks(world, validated, config_of(train, **parallel), str(tmp_path / "many"))
    for result_losses, values, _ in results:
        assert result_losses == pytest.approx(losses, rel=TOLERANCE)
        assert values == pytest.approx(expected, rel=TOLERANCE)
    assert pixels.std() > 10 and np.abs(results[0][2] - pixels).max() <= 1


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_gives_the_same_numbers(reference, tmp_path, how):
    config = config_of({"activation_checkpointing": how}, pipeline=2)
    losses = run_ranks(2, train_rank, config, str(tmp_path), 3)[0]["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference["losses"][:3]), rtol=TOLERANCE, atol=0)
    assert STEPS > 3


@pytest.mark.distributed
def test_bf16_follows_fp32_within_its_rounding(reference, tmp_path):
    config = config_of({"precision": "bf16"}, pipeline=2, tensor=2)
    losses = run_ranks(4, train_rank, config, str(tmp_path))[0]["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference["losses"]), rtol=2e-2, atol=0)
