"""bf16 training keeps float32 masters at every stage: updates far below bf16's resolution add up in them."""

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.models import build_model

STEPS = 6
LR = 1e-6  # of weights around 0.1, whose neighbours in bf16 lie 5e-4 apart


def train_and_look(config, folder, ds):
    """``train_rank`` with the dtypes of everything that the optimizer keeps."""
    from megadit.engine.engine import TrainingEngine

    dtypes = set()
    train_batch = TrainingEngine.train_batch

    def looked(self, *args):
        result = train_batch(self, *args)
        for fragment in self.partitions.fragments():
            dtypes.update(
                t.dtype for t in (fragment.values, fragment.flat, *self.partitions.moments(fragment).values())
            )
        return result

    TrainingEngine.train_batch = looked
    return {**train_rank(config, folder, STEPS, None, ds), "dtypes": dtypes}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zero",
    [{"stage": 1}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}],
    ids=["1", "3-offload"],
)
def test_tiny_updates_add_up_in_float32(tmp_path, zero):
    optim = {"lr": LR, "warmup_steps": 0, "weight_decay": 0.0, "clip": {"value": None}}
    config = small_config(optim=optim, train={"precision": "bf16"})
    results = run_ranks(2, train_and_look, config, str(tmp_path), {"zero_optimization": zero})
    assert all(result["dtypes"] == {torch.float32} for result in results)
    masters = merge_weights(results)
    name = "y_embedder.embedding_table.weight"  # entries of size 1: Adam moves those that had a gradient by about LR
    model = build_model(config.model, seed=config.train.seed)
    start = dict(model.named_parameters())[name].detach().flatten().bfloat16()  # DeepSpeed rounds, then makes masters
    moved = (masters[name] - start.float()).abs()
    used = moved > 0
    assert used.any() and moved.max() <= 1.05 * STEPS * LR and moved[used].median() > LR
    assert torch.equal(masters[name].bfloat16(), start), "the update is too large to prove anything"
    if zero["stage"] < 3:
        assert torch.equal(results[0]["working"][name].flatten().bfloat16(), start)
