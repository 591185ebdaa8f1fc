"""Activation checkpointing: the same bits as without, less memory, with every ZeRO stage."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from helpers.training import merge_weights, small_config, train_rank
from megadit.config import LoadedConfig
from megadit.config.deepspeed.merge import merge_ds_config
from megadit.errors import UserError
from megadit.models import build_model
from megadit.parallel.recompute import run_block

MODES = ("none", "selective", "full")


class Allocations(TorchDispatchMode):
    """Every storage that an operation makes, so that those still alive can be summed."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        """Bytes still held."""
        return sum(size for ref, size in self.made.values() if not ref.expired())


def step(mode, **changes):
    """Loss, gradients and the bytes that the forward kept for the backward, of one model under ``mode``."""
    config = tiny_dit(**{"depth": 4, "qk_norm": "rms", **changes})
    model = build_model(config)
    randomize(model)
    model.recompute = mode
    x, t, cond = dit_inputs(config, 8)
    with Allocations(*model.parameters()) as memory:
        loss = model(x, t, cond).square().mean()
        held_bytes = memory.alive()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, held_bytes


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "attention_precision": "fp32"}], ids=["gelu", "swiglu"])
def test_same_bits_and_less_memory(changes):
    loss, grads, all_bytes = step("none", **changes)
    for mode, share in {"selective": 0.75, "full": 0.3}.items():
        other_loss, other_grads, held_bytes = step(mode, **changes)
        assert other_loss == loss
        assert all(torch.equal(other_grads[name], grads[name]) for name in grads), mode
        assert held_bytes < share * all_bytes, f"{mode} keeps {held_bytes / all_bytes:.2f} of the memory"


def test_evaluation_recomputes_nothing():
    config = tiny_dit()
    model = build_model(config)
    randomize(model)
    expected = model(*dit_inputs(config)).detach()
    model.recompute = "full"
    with torch.no_grad():
        assert torch.equal(model(*dit_inputs(config)), expected)
    output, taps = model(*dit_inputs(config), taps=(1, 2))
    assert torch.equal(output, expected) and len(taps) == 2


def test_an_operation_in_place_is_no_silent_error():
    weight = torch.ones(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="aten::add_ changes the result of aten.mm"):
        run_block(lambda tensors: ((tensors[0] @ weight).add_(1.0),), (torch.ones(2, 3),), "selective")


def test_zero_3_replaces_no_linear_of_selective_blocks():
    config = small_config(train={"activation_checkpointing": "selective"}, parallel={"zero_stage": 3})
    zero = merge_ds_config(LoadedConfig(config), None, 1).ds_config["zero_optimization"]
    assert zero["memory_efficient_linear"] is False
    with pytest.raises(UserError, match=r"memory_efficient_linear: true adds biases in place"):
        merge_ds_config(LoadedConfig(config), {"zero_optimization": {"memory_efficient_linear": True}}, 1)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_training_is_the_same_at_every_stage(tmp_path, stage):
    zero = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    runs = {}
    for mode in MODES:
        config = small_config(train={"micro_batch": 4, "activation_checkpointing": mode})
        runs[mode] = run_ranks(2, train_rank, config, str(tmp_path / mode), 3, None, zero)
    expected = merge_weights(runs["none"])
    for mode in ("selective", "full"):
        assert runs[mode][0]["losses"] == runs["none"][0]["losses"]
        weights = merge_weights(runs[mode])
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
