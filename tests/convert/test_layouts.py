"""What tensor and pipeline ranks saved goes to every format, bit for bit, as the same state saved whole does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.layouts.matrix import FAMILIES, matrix_config
from helpers.ranks import run_ranks
from helpers.training import assemble_rank, merge_weights, train_rank
from megadit.checkpoint.read import StoredCheckpoint
from megadit.config import RunConfig
from megadit.convert import formats
from megadit.convert.conversion import convert
from megadit.models.pixart.convert import NULL_CAPTION

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2": {"tensor": 2, "pipeline": 2, "world": 4},
    "tp2 sequence": {"tensor": 2, "sequence": True, "world": 2},
    "pp2": {"pipeline": 2, "world": 2},
}
QUICK = {("dit", "tp2 pp2"), ("uvit", "tp2 pp2")}
CASES = [
    pytest.param(family, layout, marks=[] if (family, layout) in QUICK else pytest.mark.slow)
    for layout in LAYOUTS
    for family in FAMILIES
]
# What the originals have in place of what the matrix trains.
_THEIRS = {"dit": {"mlp": "gelu_tanh", "qk_norm": "none"}, "mmdit": {"mlp": "gelu_tanh"}}


def config_of(family: str, root: Path, **parallel: Any) -> RunConfig:
    values = matrix_config(family, root, False, **parallel).model_dump()
    values["model"] |= _THEIRS.get(family, {})
    if family == "mmdit":
        values["model"]["text"]["pooled_dim"] = values["model"]["text"]["dim"]
        values["data"]["text"]["pooled"] = "same"
    return RunConfig.model_validate(values)


def save_whole(config: RunConfig, folder: str, checkpoint: str) -> str:
    """One process takes the checkpoint over and saves it at once."""
    return str(assemble_rank(config, folder, checkpoint).save())


def tensors_in(value: Any, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a file, of a folder's files, or of what a file holds, by where they are."""
    if isinstance(value, Path):
        if value.is_dir():
            parts: Any = [(path.name, path) for path in sorted(value.iterdir())]
        elif value.suffix in (".pt", ".bin"):
            return tensors_in(torch.load(value, weights_only=False), name)
        else:
            return tensors_in(load_file(value), name) if value.suffix == ".safetensors" else {}
    elif isinstance(value, torch.Tensor):
        return {name: value}
    else:
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {at: tensor for key, part in parts for at, tensor in tensors_in(part, f"{name}/{key}").items()}


def export(run: Path, form: str, family: str, out: Path) -> dict[str, torch.Tensor]:
    """What ``run`` becomes in that format."""
    target = out / ("weights.pt" if form.startswith("official") else form)
    out.mkdir(exist_ok=True)
    convert("megadit", form, run, target, allow_inexact=family == "dit")
    return tensors_in(target, "")


def forms_of(family: str) -> list[str]:
    """All formats that a run of this family can leave for."""
    others = {"megadit", *(form for form in formats() if form.startswith("official") and form != f"official-{family}")}
    return [form for form in formats() if form not in others and (family, form) != ("uvit", "diffusers")]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_shares_go_to_every_format_as_what_is_whole(tmp_path: Path, family: str, layout: str) -> None:
    parallel = LAYOUTS[layout]
    spread, whole = tmp_path / "spread", tmp_path / "whole"
    results = run_ranks(parallel["world"], train_rank, config_of(family, tmp_path, **parallel), str(spread), 1)
    run_ranks(1, save_whole, config_of(family, tmp_path), str(whole), results[0]["saved"])
    held = {kind: merge_weights(results, kind) for kind in ("pieces", "exp_avg", "ema/0.9")}
    for run in (spread, whole):
        with StoredCheckpoint(run / "checkpoints" / "step-00000001").reader() as reader:
            for kind, values in held.items():
                for name, expected in values.items():
                    stored = torch.empty_like(expected)
                    reader.read_into(stored, "weights" if kind == "pieces" else kind, name)
                    assert torch.equal(stored, expected), (run.name, kind, name)
    for form in forms_of(family):
        exported = export(spread, form, family, tmp_path / "from-spread")
        expected_state = export(whole, form, family, tmp_path / "from-whole")
        assert exported.keys() == expected_state.keys() and exported, form
        assert [at for at, values in expected_state.items() if not torch.equal(exported[at], values)] == [], form
        if form == "safetensors":
            plain = {at.rpartition("/")[2]: values.flatten() for at, values in exported.items()}
            assert plain.keys() - {NULL_CAPTION} == held["pieces"].keys()
            assert all(torch.equal(plain[name], values) for name, values in held["pieces"].items())
