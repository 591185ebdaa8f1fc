"""Weights that are NaN, infinite or beyond float32 are named and refused unless allowed, whatever their format."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.foreign.deepspeed_program import CONFIG
from helpers.foreign.official_releases import release
from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.weights import randomize
from megadit.cli import convert_checkpoint
from megadit.config import ModelConfig
from megadit.convert import to_diffusers, to_official
from megadit.convert.conversion import convert
from megadit.errors import UserError
from megadit.finite import all_finite, describe_nonfinite
from megadit.models import build_model
from megadit.models.pixart.convert import NULL_CAPTION

NAME = "blocks.1.mlp.fc1.weight"
ROOT = Path(__file__).resolve().parents[2]


def state_of(model: ModelConfig) -> dict[str, Tensor]:
    built = build_model(model, seed=5)
    randomize(built)
    return {name: value.detach().clone() for name, value in built.state_dict().items()}


def spoilt(values: Tensor, *bad: float) -> Tensor:
    values = values.clone()
    values.view(-1)[: len(bad)] = torch.tensor(bad, dtype=values.dtype)
    return values


NAN, INF = float("nan"), float("inf")


def make(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of the kind, with two NaN and one infinite value in one tensor; and what its conversion takes."""
    if kind.startswith("deepspeed"):
        return deepspeed(folder, {kind.partition("/")[2] or "weights"}), {"config": CONFIG}
    model = tiny_pixart() if kind in ("diffusers", "null caption") else tiny_dit()
    state = state_of(model)
    if kind == "diffusers":
        config_json, stored = to_diffusers(model, state)
        stored["transformer_blocks.1.attn1.to_k.weight"] = spoilt(
            stored["transformer_blocks.1.attn1.to_k.weight"], NAN, INF, NAN
        )
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_json))
        save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
        return folder, {"max_length": None}
    name = NULL_CAPTION if kind == "null caption" else NAME
    state[name] = spoilt(state[name], NAN, INF, NAN)
    if kind == "official":
        torch.save({"model": to_official(model, state)}, folder.with_suffix(".pt"))
        return folder.with_suffix(".pt"), {}
    if kind == "fp32-state-dict":
        torch.save(state, folder.with_suffix(".bin"))
        return folder.with_suffix(".bin"), {}
    save_file(state, folder.with_suffix(".safetensors"))
    return folder.with_suffix(".safetensors"), {}


def deepspeed(folder: Path, kinds: set[str]) -> Path:
    """One rank, one group, ZeRO-2; the first values of the first parameter are bad in ``kinds``."""
    values = OrderedDict(build_model(CONFIG.model, seed=5).state_dict())
    flat = torch.cat([value.flatten() for value in values.values()])
    state = {"step": 5, "exp_avg": flat * 2, "exp_avg_sq": flat * flat}
    buffers = {"weights": flat, **state}
    for kind in kinds:
        buffers[kind] = spoilt(buffers[kind], NAN, INF, NAN)
    zero = {
        "base_optimizer_state": {"state": {0: {**state, **buffers}}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "single_partition_of_fp32_groups": [buffers["weights"]],
        "zero_stage": 2,
        "group_paddings": [0],
        "partition_count": [1],
    }
    shapes = OrderedDict((name, value.shape) for name, value in values.items())
    model = {"module": values, "param_shapes": [shapes], "global_steps": 7, "skipped_steps": 2, "dp_world_size": 1}
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    torch.save(model, tag / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": zero}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


FIRST = next(iter(build_model(CONFIG.model, device="meta").state_dict()))


@pytest.mark.parametrize(
    ("kind", "source_format", "name"),
    [
        ("safetensors", "safetensors", NAME),
        ("fp32-state-dict", "fp32-state-dict", NAME),
        ("null caption", "safetensors", NULL_CAPTION),
        ("deepspeed", "deepspeed", FIRST),
        ("deepspeed/exp_avg_sq", "deepspeed", f"exp_avg_sq of {FIRST}"),
    ],
)
def test_they_are_named_and_refused_unless_allowed(tmp_path: Path, kind: str, source_format: str, name: str) -> None:
    source, options = make(kind, tmp_path / "in")
    out = tmp_path / "out"
    options.setdefault("config", None)
    target = "megadit" if kind.startswith("deepspeed") else "fp32-state-dict"
    with pytest.raises(UserError, match=rf"IN: '{name}' holds 2 NaN, 1 infinite of [\d,]+ values; .*--allow-nonfinite"):
        convert(source_format, target, source, out, **options)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".tmp"))]
    outcome = convert(source_format, target, source, out, **options, allow_nonfinite=True)
    assert out.exists() and any(f"'{name}' holds 2 NaN, 1 infinite" in note for note in outcome.notes)


def test_of_official_and_megadits_own_checkpoints(tmp_path: Path) -> None:
    source, _ = make("official", tmp_path / "in")
    arguments = {"hints": {"heads": 2}, "overrides": ["data.vae=null"]}
    with pytest.raises(UserError, match=f"'{NAME}' holds 2 NaN, 1 infinite"):
        convert("official-dit", "megadit", source, tmp_path / "run", **arguments)
    convert("official-dit", "megadit", source, tmp_path / "run", **arguments, allow_nonfinite=True)
    with pytest.raises(UserError, match=f"'{NAME}' holds 2 NaN, 1 infinite"):
        convert("megadit", "official-dit", tmp_path / "run", tmp_path / "back.pt")
    convert("megadit", "official-dit", tmp_path / "run", tmp_path / "back.pt", allow_nonfinite=True)
    written = torch.load(tmp_path / "back.pt", weights_only=True)[NAME]
    assert written.isnan().sum() == 2 and written.isinf().sum() == 1


def test_a_table_of_positions_is_named_too_and_never_let_through(tmp_path: Path) -> None:
    state = release("dit", 1)
    state["pos_embed"][0, 0, 0] = math.nan
    torch.save(state, tmp_path / "x.pt")
    for allowed in (False, True):
        with pytest.raises(UserError, match="'pos_embed' holds 1 NaN of 768 values, and it is the table of positions"):
            convert(
                "official-dit",
                "megadit",
                tmp_path / "x.pt",
                tmp_path / "out",
                hints={"heads": 2},
                allow_nonfinite=allowed,
            )


def test_of_diffusers_folders(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    source, _ = make("diffusers", tmp_path / "in")
    with pytest.raises(UserError, match=r"'transformer_blocks.1.attn1.to_k.weight' holds 2 NaN, 1 infinite"):
        convert("diffusers", "safetensors", source, tmp_path / "out.safetensors")
    outcome = convert("diffusers", "safetensors", source, tmp_path / "out.safetensors", allow_nonfinite=True)
    assert any("not measured, since outputs are not finite" in note for note in outcome.notes)
    assert outcome.difference is None


def test_several_tensors_are_counted_and_float64_may_end_beyond_float32(tmp_path: Path) -> None:
    values = {
        "a": torch.tensor([1.0, NAN]),
        "b": torch.tensor([1e300, -1e39, INF, 3.4e38], dtype=torch.float64),
        "c": torch.tensor([65504.0, 1.0]).half(),
        "n": torch.tensor([2**62]),
    }
    save_file(values, tmp_path / "x.safetensors")
    several = "'[ab]' holds [^;]*, and so do 1 more tensors; .*nothing is converted"
    with pytest.raises(UserError, match=several):
        convert("safetensors", "safetensors", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    del values["a"]
    save_file(values, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="'b' holds 1 infinite, 2 beyond float32's range of 4 values"):
        convert("safetensors", "safetensors", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    values["b"] = torch.tensor([3.4e38, 1.0], dtype=torch.float64)
    save_file(values, tmp_path / "x.safetensors")
    outcome = convert("safetensors", "safetensors", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not any("holds" in note for note in outcome.notes if "the source holds weights as" not in note)
    assert load_file(tmp_path / "y.safetensors")["b"].isfinite().all()


def test_the_command_has_the_option(tmp_path: Path, capsys: Any) -> None:
    save_file({"a": torch.tensor([1.0, NAN])}, tmp_path / "x.safetensors")
    arguments = ["--from", "safetensors", "--to", "safetensors", str(tmp_path / "x.safetensors"), str(tmp_path / "y")]
    with pytest.raises(UserError, match="--allow-nonfinite"):
        convert_checkpoint.main(arguments)
    assert convert_checkpoint.main([*arguments, "--allow-nonfinite"]) == 0
    assert "note: 'a' holds 1 NaN of 2 values; they are written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make_odd",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["sparse", "repeated", "meta"],
)
def test_tensors_without_plain_values_are_refused(tmp_path: Path, make_odd: Any) -> None:
    torch.save({"a": torch.ones(2), "odd": make_odd()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="'odd' is |holds an object of|cannot be read"):
        convert("fp32-state-dict", "safetensors", tmp_path / "x.bin", tmp_path / "y.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_one_pass_finds_them_in_every_type(dtype: torch.dtype) -> None:
    good = torch.arange(-3.0, 3.0).to(dtype)
    assert not describe_nonfinite([("x", good)])
    for bad in (NAN, INF, -INF):
        message = describe_nonfinite([("good", good), ("x", spoilt(good.float(), bad).to(dtype))])
        assert message == f"'x' holds 1 {'NaN' if bad != bad else 'infinite'} of 6 values"
    assert all_finite(torch.empty(0)) and not describe_nonfinite([("count", torch.tensor([1]))])
