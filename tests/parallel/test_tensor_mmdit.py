"""MMDiT over two tensor-parallel ranks against itself whole: output, and gradients of what both ranks hold."""

from __future__ import annotations

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.tiny_mmdit import mmdit_inputs, tiny_mmdit


def _gaps() -> tuple[float, dict[str, float], float]:
    """Largest differences of outputs, and relative ones of whole gradients; the share of parameters held here."""
    import torch.distributed as dist

    from megadit.models import build_model
    from megadit.parallel.tensor import TensorLayout

    config = tiny_mmdit(pooled=12, qk_norm="rms", mlp="swiglu", init="fan_in", adaln_init="fan_in")
    layout = TensorLayout(2, dist.get_rank(), group=dist.group.WORLD)
    whole, share = build_model(config, seed=3).double(), build_model(config, layout, seed=3).double()
    readout = torch.sin(torch.arange(16 * 48.0)).view(16, 48)
    x, t, cond = mmdit_inputs(config, lengths=[5, 2, 3])
    outputs = []
    for model in (whole, share):
        model.final_layer.linear.weight.data.copy_(readout)  # zero would hide everything
        outputs.append(model(x, t, cond))
        outputs[-1].square().mean().backward()
    both = zip(whole.named_parameters(), share.parameters(), strict=True)
    gradients = {
        name: float((a.grad - b.grad).abs().max() / (a.grad.abs().max() + 1e-12))  # type: ignore[operator, union-attr]
        for (name, a), b in both
        if a.shape == b.shape
    }
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, share)]
    return float((outputs[0] - outputs[1]).abs().max()), gradients, sizes[1] / sizes[0]


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    for output, gradients, share in run_ranks(2, _gaps):
        assert output < 1e-10 and max(gradients.values()) < 1e-9
        assert "joint_blocks.0.context_block.attn.ln_q.weight" in gradients and share < 0.6
