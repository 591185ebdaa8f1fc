"""Two exact identities: muP at m = 1 is SP bit for bit; a forward multiplier trades for init, LR, eps and decay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.weights import randomize
from megadit.config import ModelConfig, OptimConfig
from megadit.config.schema.model import RoleHP, RoleHPs
from megadit.models import StagedModel, build_model
from megadit.mup.groups import param_groups
from megadit.mup.spec import walk_specs


def _train(model: StagedModel, config: ModelConfig, groups: list[dict[str, Any]], steps: int) -> list[Tensor]:
    """Losses of AdamW on one fixed regression batch."""
    x, t, cond = dit_inputs(config)
    target = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x, t, cond)[:, : config.in_channels] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("init", ["original", "fan_in"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_mup_at_the_base_width_is_sp_bit_for_bit(init: str, weight_decay: float) -> None:
    hps = RoleHPs(hidden=RoleHP(mult=1.5, lr=0.7, init_std=1.2), input=RoleHP(mult=0.8))
    optim = OptimConfig(lr=0.003, weight_decay=weight_decay, eps_mode="scaled", wd_mode="sqrt")
    results = []
    for changes in ({"parametrization": "mup", "base_width": 48}, {"parametrization": "sp"}):
        config = tiny_dit(init=init, role_hps=hps, output_mult=2.0, **changes)
        model = build_model(config, seed=4)
        start = [param.detach().clone() for param in model.parameters()]
        losses = _train(model, config, param_groups(model, optim), 4)
        results.append((start, losses, [param.grad for param in model.parameters()], list(model.parameters())))
    for mup_values, sp_values in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mup_values, sp_values, strict=True))
    assert not torch.equal(results[0][1][0], results[0][1][-1])  # it did train


def _scale_role(model: nn.Module, groups: list[dict[str, Any]], role: str, theta: float) -> None:
    """Move the multiplier of one role's matrices into their values: W theta, LR theta, eps / theta, wd / theta."""
    moved = {name for name, _, spec in walk_specs(model) if spec.role == role and len(spec.shape) > 1}
    for module in model.modules():
        specs = getattr(module, "param_specs", {})
        if "weight" in specs and specs["weight"].role == role and len(specs["weight"].shape) > 1:
            assert specs["weight"].forward_mult == theta
            specs["weight"] = dataclasses.replace(specs["weight"], forward_mult=1.0)
            module.weight.data.mul_(theta)
    for group in groups:
        if set(group["param_names"]) <= moved:
            group["lr"] *= theta
            group["eps"] /= theta
            group["weight_decay"] /= theta
        else:
            assert not moved & set(group["param_names"])


@pytest.mark.parametrize("role", ["output", "hidden", "input"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_multiplier_trades_for_init_lr_eps_and_decay(role: str, weight_decay: float) -> None:
    """abc-shift of Tensor Programs (arXiv 2203.03466, Lemma J.1) with AdamW decaying by lr * wd, in float64."""
    m = 4.0
    changes: dict[str, Any] = {}
    if role != "output":  # the readout has its 1/m already
        changes["role_hps"] = RoleHPs(**{role: RoleHP(mult=1 / m)})
    config = tiny_mup_dit(64, 16, **changes)
    optim = OptimConfig(lr=0.01, weight_decay=weight_decay, eps=1e-4)
    runs = []
    for shifted in (False, True):
        model = build_model(config).double()
        randomize(model, 0.2)
        groups = param_groups(model, optim)
        if shifted:
            _scale_role(model, groups, role, 1 / m)
        losses = _train(model, config, groups, 6)
        runs.append((model, losses))
    (plain, plain_losses), (shifted_model, shifted_losses) = runs
    torch.testing.assert_close(shifted_losses, plain_losses, rtol=1e-11, atol=0)
    assert plain_losses[-1] < 0.95 * plain_losses[0]
    pairs = zip(walk_specs(plain), shifted_model.parameters(), strict=True)
    for (name, param, spec), other in pairs:
        factor = 1 / m if spec.role == role and len(spec.shape) > 1 else 1.0
        torch.testing.assert_close(other, param * factor, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: n + text)
