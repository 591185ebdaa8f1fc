"""Torch files of other programs under sound archives: official checkpoints and DeepSpeed's, with odd parts."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from helpers.foreign.deepspeed_program import Case, save_all
from helpers.fuzz.hunt import efforts, hunt, odd_trees
from helpers.fuzz.weight_files import converted
from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from megadit.convert import to_official
from megadit.convert.request import Request
from megadit.convert.torch_files.safe_load import load_file
from megadit.models import build_model

ODD = (
    torch.zeros(0),
    torch.tensor(3),
    torch.tensor(float("nan")),
    torch.zeros(2, 3),
    torch.zeros(5, dtype=torch.int64),
    torch.zeros(4, dtype=torch.bool),
    torch.zeros(1, 2, 3, 4, 5),
    torch.zeros(3, dtype=torch.complex64),
    {"a": torch.zeros(2)},
    torch.zeros(2, 2).to_sparse(),
    torch.zeros(1).expand(7),
    torch.Size([2, 2]),
    torch.float16,
    (1, 2),
    1j,
)


pytestmark = pytest.mark.filterwarnings("ignore")


MODELS = {
    "dit": (tiny_dit(), {"heads": 2}),
    "pixart": (tiny_pixart(), {"heads": 2}),
    "uvit": (tiny_uvit("class"), {"heads": 2}),
    "mmdit": (tiny_mmdit(pooled=12), {"heads": 2, "input_size": 8}),
}


@efforts
@pytest.mark.parametrize("family", sorted(MODELS))
def test_official_checkpoints(effort: str, family: str, tmp_path: Path) -> None:
    model, hints = MODELS[family]
    built = build_model(model)
    randomize(built)
    state = to_official(model, {name: value.detach().clone() for name, value in built.state_dict().items()})
    wrapped = {"model": state, "ema": dict(state), "opt": {"state": {}}, "args": Namespace(lr=1e-4), "epoch": 3}
    file = tmp_path / "model.pt"
    torch.save(wrapped, file)
    converted(f"official-{family}", file, Request(hints=hints))  # sound as it is

    def read(values: Any) -> None:
        torch.save(values, file)
        converted(f"official-{family}", file, Request(hints=hints))

    hunt(effort, odd_trees([state, wrapped], ODD), read, quick=8, long=1500)


CASES = {"plain": Case(0), "zero1": Case(1, bf16=True), "zero3": Case(3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of DeepSpeed at three stages."""
    root = tmp_path_factory.mktemp("deepspeed")
    run_ranks(1, save_all, str(root), CASES)
    return root


@efforts
@pytest.mark.parametrize("case", sorted(CASES))
def test_checkpoints_of_deepspeed(effort: str, case: str, saved: Path, tmp_path: Path) -> None:
    """Each of its files in turn has odd parts."""
    folder = tmp_path / "saved"
    shutil.copytree(saved / case, folder)
    converted("deepspeed", folder)  # sound as it is
    files = sorted(folder.rglob("*.pt"))
    trees = {file: _in_memory(load_file(file)) for file in files}
    whole = {file: file.read_bytes() for file in files}
    trees = {file: tree for file, tree in trees.items() if _can_be_written(tree)}
    assert trees

    def read(drawn: tuple[Path, Any]) -> None:
        file, values = drawn
        torch.save(values, file)
        try:
            converted("deepspeed", folder)
        finally:
            file.write_bytes(whole[file])

    hunt(
        effort,
        st.one_of(*(st.tuples(st.just(file), odd_trees([tree], ODD)) for file, tree in trees.items())),
        read,
        quick=8,
        long=1500,
    )


def _in_memory(tree: Any) -> Any:
    """The tree without tensors that lie in its file, which is about to be written anew."""
    if isinstance(tree, dict):
        return {key: _in_memory(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(map(_in_memory, tree))
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def _can_be_written(tree: Any) -> bool:
    """Whether the tree holds no placeholder of a class, which would be refused where it is written anew."""
    if isinstance(tree, dict | list | tuple):
        return all(map(_can_be_written, tree.values() if isinstance(tree, dict) else tree))
    return tree is None or isinstance(tree, bool | int | float | str | bytes | torch.Tensor | torch.Size | torch.dtype)
