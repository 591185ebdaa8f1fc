"""DeepSpeed's native checkpoint at ZeRO stage 0: one file with the model and the optimizer's own state dict.

The optimizer's part names no parameter. Moments are read where the order is certain: groups that carry
``param_names`` (megadit's do, and torch's for named parameters), or a single group of all of the model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.format import WEIGHTS
from megadit.config import RunConfig
from megadit.convert.contents import Contents, Part
from megadit.convert.deepspeed.files import adam_step, check_tensors, position_of, version_of
from megadit.convert.torch_files.write import save_streaming
from megadit.engine.deepspeed.partitions import MOMENTS
from megadit.errors import UserError

TAG = "global_step{}"


def read_plain(folder: Path, state: Mapping[str, Any]) -> Contents:
    """The contents of a stage-0 checkpoint, given what its model file holds."""
    buffers = set(state.get("buffer_names") or ())
    module: dict[str, Tensor] = {name: value for name, value in state["module"].items() if name not in buffers}
    check_tensors(module.values())
    description = f"DeepSpeed checkpoint '{folder}' (stage 0, {version_of(state)})"
    values: dict[str, dict[str, Tensor]] = {WEIGHTS: module}

    def read(kind: str, name: str) -> list[Part]:
        return [(0, values[kind][name].reshape(-1))]

    shapes = {name: tuple(value.shape) for name, value in module.items()}
    contents = Contents(description, shapes, (WEIGHTS, *MOMENTS), read, position_of(state))
    optimizer = state.get("optimizer") or {}
    masters = optimizer.get("fp32_groups")  # of 16-bit training without ZeRO
    inner = optimizer if "param_groups" in optimizer else optimizer.get("optimizer_state_dict") or {}
    if "param_groups" not in inner or (inner is not optimizer and not isinstance(masters, list)):
        return contents.weights_only("it holds no optimizer state that is read at stage 0")
    groups: list[dict[str, Any]] = inner["param_groups"]
    contents = replace(contents, groups=groups)
    names = _names(groups, list(module))
    if names is None:
        return contents.weights_only("at stage 0 DeepSpeed does not say which moments are of which parameter")
    flat = [name for row in names for name in row]
    if masters is not None:
        values[WEIGHTS] = dict(zip(flat, [value for group in masters for value in group], strict=True))
        check_tensors(values[WEIGHTS].values())
        if any(values[WEIGHTS][name].numel() != module[name].numel() for name in flat):
            raise ValueError("its float32 weights have other sizes than its model")
    states = [inner["state"].get(number, {}) for group in groups for number in group["params"]]
    step, reason = adam_step(states, groups)
    for kind in MOMENTS if not reason else ():
        values[kind] = {name: state[kind] for name, state in zip(flat, states, strict=True)}
        check_tensors(values[kind].values())
        if any(values[kind][name].shape != module[name].shape for name in flat):
            reason = "the optimizer's moments have other shapes than the parameters in their order"
    return contents.weights_only(reason) if reason else replace(contents, adam_step=step)


def _names(groups: Sequence[Mapping[str, Any]], module: Sequence[str]) -> list[list[str]] | None:
    """Parameter names by group, where they are certain and cover the model."""
    named = [list(group.get("param_names") or ()) for group in groups]
    if len(groups) == 1 and not named[0]:
        named = [list(module)]
    counts = [len(group["params"]) for group in groups]
    covered = sorted(name for names in named for name in names) == sorted(module)
    return named if covered and [len(names) for names in named] == counts else None


def write_plain(contents: Contents, target: Path) -> list[str]:
    """Write a folder that ``engine.load_checkpoint`` reads at stage 0 in float32, on any number of ranks.

    Other stages read its weights with ``load_module_only=True``. The optimizer's state is in the order of megadit's
    groups, for which the config is needed. Returns what people should know.

    Raises:
        UserError: there are moments and no config.
    """
    tag = TAG.format(contents.position.step)
    (target / tag).mkdir(parents=True)
    optimizer = None
    if contents.has_moments:
        if contents.config is None:
            raise UserError("--config: is needed to write optimizer groups for deepspeed; give the run's YAML file")
        optimizer = _optimizer(contents, contents.config)
    state = {
        **model_header(contents),
        "module": {name: contents.deferred(WEIGHTS, name) for name in contents.shapes},
        "optimizer": optimizer,
        "param_shapes": None,
    }
    save_streaming(state, target / tag / "mp_rank_00_model_states.pt")
    (target / "latest").write_text(tag, encoding="utf-8")
    if optimizer is None:
        return ["weights only: load it with engine.load_checkpoint(OUT, load_module_only=True)"]
    count = len(optimizer["param_groups"])
    return [
        f"load it with engine.load_checkpoint(OUT) at ZeRO stage 0 in fp32, with megadit's {count} optimizer groups in "
        "their order; other stages: --to deepspeed-universal"
    ]


def model_header(contents: Contents) -> dict[str, Any]:
    """The entries of a model file that DeepSpeed wants beside weights and optimizer."""
    position = contents.position
    return {
        "buffer_names": [],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": position.skipped_steps,
        "global_steps": position.step,
        "global_samples": position.samples_seen,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version("deepspeed"),
    }


def _optimizer(contents: Contents, config: RunConfig) -> dict[str, Any]:
    """torch's state dict of AdamW over megadit's groups, at the schedule's base rates."""
    from megadit.models import build_model
    from megadit.mup.groups import param_groups

    groups = param_groups(build_model(config.model, device="meta"), config.optim)
    plain = torch.optim.AdamW(groups, betas=config.optim.betas).state_dict()
    names = [name for group in groups for name in group["param_names"]]
    step = float(contents.adam_step)
    state = {
        number: {"step": torch.tensor(step), **{kind: contents.deferred(kind, name) for kind in MOMENTS}}
        for number, name in enumerate(names)
    }
    return {"state": state, "param_groups": plain["param_groups"]}
