"""Training code that is not megadit's: a megadit model in a DeepSpeed engine of its own, with its own checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from helpers.training import small_config

CONFIG = small_config()
KINDS = {"weights": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # what DeepSpeed calls them
LR = 0.003


@dataclass(frozen=True)
class Case:
    """One engine. ``groups`` is one (all parameters), decay (two groups without names), named, or megadit (its own)."""

    stage: int
    groups: str = "decay"
    bf16: bool = False
    frozen: bool = False
    steps: int = 2
    optimizer: str = "adamw"
    zero: dict[str, Any] = field(default_factory=dict)
    ds: dict[str, Any] = field(default_factory=dict)


def groups_of(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    """Optimizer groups as other code makes them: by dimension, and with numbers of its own."""
    if case.groups == "megadit":
        from megadit.mup.groups import param_groups

        return param_groups(model, CONFIG.optim)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if case.groups == "one":
        return [{"params": [p for _, p in named], "lr": LR, "weight_decay": 0.02}]
    halves = [[(n, p) for n, p in named if (p.ndim > 1) == decay] for decay in (True, False)]
    groups = [
        {"params": [p for _, p in half], "lr": rate, "weight_decay": decay}
        for half, rate, decay in zip(halves, (LR, 2 * LR), (0.02, 0.0), strict=True)
    ]
    if case.groups == "named":
        for group, half in zip(groups, halves, strict=True):
            group["param_names"] = [name for name, _ in half]
    return groups


def engine_of(case: Case, seed: int = 1) -> Any:
    """A DeepSpeed engine over the model of CONFIG, with torch's AdamW (or SGD)."""
    import deepspeed

    from megadit.engine.deepspeed.partitions import forget_groups
    from megadit.models import build_model

    model = build_model(CONFIG.model, seed=seed)
    if case.frozen:
        model.get_parameter("y_embedder.embedding_table.weight").requires_grad_(False)
    groups = groups_of(model, case)
    if case.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        **({"bf16": {"enabled": True}} if case.bf16 else {}),
        **case.ds,
    }
    forget_groups()  # of a run in the process that this one was forked from
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    """Some steps on noise; the losses."""
    from megadit.conditioning import Conditioning

    draw, losses = torch.Generator().manual_seed(torch.distributed.get_rank()), []
    dtype = next(engine.module.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=draw).to(dtype)
        t = torch.rand(4, generator=draw) * 1000
        labels = torch.randint(0, 10, (4,), generator=draw)
        loss = (engine(x, t, Conditioning(labels=labels)).float() - x.float()).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state_of(engine: Any, moments: bool = True) -> dict[str, dict[str, Tensor]]:
    """Weights (and moments) of every trained parameter, as DeepSpeed's own public calls gather them (all ranks)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moments and hasattr(engine.optimizer, "round_robin_bit16_groups"):
        _link_moments(engine.optimizer)
    state: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS if moments or kind == "weights"}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        for kind in state:
            key = KINDS[kind]
            if engine.zero_optimization_stage() > 0:
                value = safe_get_full_fp32_param(p) if kind == "weights" else safe_get_full_optimizer_state(p, key)
            elif hasattr(engine.optimizer, "fp32_groups"):  # 16-bit training without ZeRO
                value = _unfused(engine.optimizer, p, key)
            else:
                value = p.data if kind == "weights" else engine.optimizer.state[p][key]
            state[kind][name] = value.detach().float().clone().cpu()
    return state


def _link_moments(zero: Any) -> None:
    """DeepSpeed links its parameters to their moments in the first group's first step, when the others have none."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for p in group:
            if p._hp_mapping is not None:
                p._hp_mapping.set_optim_state_fragment(flat, zero.optimizer.state[flat])


def _unfused(optimizer: Any, parameter: nn.Parameter, key: str) -> Tensor:
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for p, master in zip(group, masters, strict=True):
            if p is parameter:
                return master if key == "fp32" else optimizer.optimizer.state[master][key]
    raise KeyError(key)


def save_all(folder: str, cases: dict[str, Case]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Train each case on these ranks and save it into ``folder/NAME``; its state by name, from rank 0."""
    states = {}
    for name, case in cases.items():
        engine = engine_of(case)
        train(engine, case.steps)
        state = state_of(engine, moments=case.optimizer == "adamw" and case.steps > 0)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"epoch": 3})
        engine.destroy()
        if torch.distributed.get_rank() == 0:
            states[name] = state
    return states
