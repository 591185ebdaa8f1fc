"""Tensor-parallel runs train what one process does, save for any layout, and count each gradient once in the norm."""

import pytest
import torch

from helpers.layouts.parity import (
    SECTIONS,
    STEPS,
    TOLERANCE,
    WEIGHT_TOLERANCE,
    assert_same_training,
    config_of,
    gap_of,
    reference_run,
    run_single_process,
)
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, merge_weights, plain_torch_run, small_config, train_on, train_rank
from megadit.checkpoint.inspect import verify
from megadit.checkpoint.read import StoredCheckpoint


@pytest.fixture(scope="module")
def reference():
    return reference_run()


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    return run_single_process(str(tmp_path_factory.mktemp("alone")))


LAYOUTS = [
    (2, {"tensor": 2, "zero_stage": 0}),
    (4, {"tensor": 4, "zero_stage": 1}),
    (4, {"tensor": 2, "zero_stage": 2}),
    (2, {"tensor": 2, "sequence": True, "zero_stage": 1}),
    (4, {"tensor": 2, "sequence": True, "zero_stage": 3}),
    *(
        pytest.param(world, parallel, marks=pytest.mark.slow)
        for world, parallel in [
            (2, {"tensor": 2, "zero_stage": 1}),
            (4, {"tensor": 2, "zero_stage": 0}),
            (4, {"tensor": 2, "zero_stage": 1}),
            (4, {"tensor": 2, "zero_stage": 3}),
            (4, {"tensor": 4, "sequence": True, "zero_stage": 1}),
        ]
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_ranks_that_share_layers_train_what_one_does(reference, single_process, tmp_path, world, parallel):
    results = run_ranks(world, train_rank, config_of(**parallel), str(tmp_path))
    assert_same_training(results, reference, single_process)
    size = parallel["tensor"]
    shares = {fragment[0] for result in results for fragment in result["pieces"] if fragment[-1] is not None}
    for first in range(0, world, size):
        for peer in results[first : first + size]:
            assert peer["losses"] == results[first]["losses"]
            for name, p in peer["working"].items():
                if name not in shares and p.shape == results[first]["working"].get(name, p).shape:
                    assert torch.equal(p, results[first]["working"].get(name, p)), f"{name} drifts apart"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, {"tensor": 2}), (1, {})), ((1, {}), (4, {"tensor": 2, "zero_stage": 3})), ((2, {}), (4, {"tensor": 4}))],
    ids=["shared-to-alone", "alone-to-shared", "copies-to-shared"],
)
def test_a_run_goes_on_in_another_layout(reference, single_process, tmp_path, before, after):
    (first, parallel), (second, other) = before, after
    half = run_ranks(first, train_rank, config_of(**parallel), str(tmp_path), 3)
    stored = StoredCheckpoint(tmp_path / "checkpoints" / "step-00000003")
    assert verify(stored) == []
    elements = sum(fragment.stop - fragment.start for fragment in stored.index.fragments if fragment.kind == "weights")
    assert elements == sum(p.numel() for p in reference["weights"].values()), "an element is stored twice or not at all"
    rest = run_ranks(second, train_rank, config_of(**other), str(tmp_path), None, half[0]["saved"])
    assert_same_training(rest, reference, single_process, skip=3)


def norms_without_marks(config, folder):
    run = assemble_rank(config, folder)
    for p in run.engine.module.parameters():
        if hasattr(p, "tensor_model_parallel"):
            del p.tensor_model_parallel
    return [record["grad_norms"] for record in train_on(run, 2)]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
def test_a_share_without_its_mark_is_seen_in_the_norm(reference, tmp_path, stage):
    norms = run_ranks(2, norms_without_marks, config_of(tensor=2, zero_stage=stage), str(tmp_path))[0]
    # The readout starts at zero, and what lies before it has a gradient from the second step on.
    assert norms[1]["hidden"] < 0.95 * reference["role_norms"][1]["hidden"]


@pytest.mark.distributed
def test_clipping_by_role_counts_shares_once(tmp_path):
    # A large epsilon: clipped this hard, Adam would make full steps of entries that are rounding alone.
    clip = {"clip": {"mode": "per_group", "value": 0.05}, "eps": 1e-4}
    plain = small_config(train={"steps": STEPS}, optim=clip, **SECTIONS)
    expected = plain_torch_run(plain, STEPS)
    for stage in (0, 1):
        config = small_config(
            parallel={"tensor": 2, "zero_stage": stage}, train={"steps": STEPS}, optim=clip, **SECTIONS
        )
        results = run_ranks(2, train_rank, config, str(tmp_path / str(stage)))
        for norms, expected_norms in zip(results[0]["role_norms"], expected["role_norms"], strict=True):
            assert norms == pytest.approx(expected_norms, rel=TOLERANCE)
        for name, weights in merge_weights(results).items():
            assert gap_of(name, weights, expected["weights"][name]) <= WEIGHT_TOLERANCE, name


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_gives_the_same_numbers(tmp_path, how):
    losses = []
    for index, recompute in enumerate(("none", how)):
        config = config_of(tensor=2, sequence=True)
        train = config.train.model_copy(update={"activation_checkpointing": recompute})
        results = run_ranks(2, train_rank, config.model_copy(update={"train": train}), str(tmp_path / str(index)), 3)
        losses.append([result["losses"] for result in results])
    assert losses[0] == losses[1]
