"""The order in which the named tensors of a stage travel, by hand for every family: pipelines of two versions meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit, uvit_inputs
from megadit.models import build_model
from megadit.models.mmdit.model import MMDiTReadout, MMDiTState
from megadit.models.patches import ConditionedTokens
from megadit.models.pixart.model import PixArtState
from megadit.models.stages import ModelInputs, ModelOutput
from megadit.models.uvit.model import UViTState

FLOATS = {
    name: torch.zeros(1, 2, 3) for name in ("tokens", "context", "t0", "t_emb", "text", "skip0", "skip1", "image")
}
FLOATS |= {
    "x": torch.zeros(1, 2, 4, 4),
    "t": torch.zeros(1),
    "condition": torch.zeros(1, 3),
    "pooled": torch.zeros(1, 5),
}
INTEGERS = {
    "labels": torch.zeros(1, dtype=torch.int64),
    "text_mask": torch.ones(1, 2, dtype=torch.bool),
    "text_lengths": torch.ones(1, dtype=torch.int32),
    "text_padding": torch.ones(1, 1, 1, 2, dtype=torch.bool),
    "key_padding": torch.ones(1, 1, 1, 2, dtype=torch.bool),
    "key_mask": torch.ones(1, 2, dtype=torch.bool),
    "grid": torch.zeros(1, 2, dtype=torch.uint8),
}
TENSORS = FLOATS | INTEGERS
NAMES = {id(tensor): name for name, tensor in TENSORS.items()}

ORDERS = [
    (ModelInputs, "x t"),
    (ModelInputs, "x t labels"),
    (ModelInputs, "x t text"),
    (ModelInputs, "x t text text_mask"),
    (ModelInputs, "x t text pooled"),
    (ModelInputs, "x t text pooled text_mask"),
    (ModelInputs, "x t text labels text_mask"),
    (ModelInputs, "x t text pooled text_mask text_lengths"),
    (ModelOutput, "image"),
    (ConditionedTokens, "tokens condition"),
    (PixArtState, "tokens t0 t_emb text"),
    (PixArtState, "tokens t0 t_emb text text_padding"),
    (MMDiTState, "tokens context condition grid"),
    (MMDiTState, "tokens context condition key_padding grid"),
    (MMDiTReadout, "tokens condition grid"),
]


@pytest.mark.parametrize(("state", "order"), ORDERS, ids=[f"{state.__name__}: {order}" for state, order in ORDERS])
def test_tensors_travel_in_this_order(state: Any, order: str) -> None:
    fields = {name: TENSORS[name] for name in order.split()}
    packed = state(**({"key_padding": None} if state is MMDiTState else {}) | fields).pack()
    assert [NAMES[id(tensor)] for tensor in packed] == order.split()
    unpacked = {name: value for name, value in vars(state.unpack(packed)).items() if value is not None}
    assert unpacked.pop("pending", ()) == ()  # of a state that is sent nothing is
    assert unpacked.keys() == fields.keys() and all(unpacked[name] is fields[name] for name in fields)


@pytest.mark.parametrize("order", ["tokens", "tokens key_mask", "tokens skip0 skip1", "tokens skip0 skip1 key_mask"])
def test_skips_travel_between_the_tokens_and_the_mask(order: str) -> None:
    skips = tuple(TENSORS[name] for name in order.split() if name.startswith("skip"))
    mask = TENSORS["key_mask"] if "key_mask" in order else None
    packed = UViTState(TENSORS["tokens"], skips, mask).pack()
    assert [NAMES[id(tensor)] for tensor in packed] == order.split()
    state = UViTState.unpack(packed)
    assert state.tokens is TENSORS["tokens"] and state.key_mask is mask
    assert all(a is b for a, b in zip(state.skips, skips, strict=True))


# Batch 3; 16 patches and 48 channels; text of 7 tokens (PixArt) or 5; shapes by stage, integers by their dtype.
X, T = (3, 4, 8, 8), (3,)
STAGES: dict[str, tuple[Any, Any, list[list[Any]]]] = {
    "dit": (tiny_dit(), dit_inputs, [[X, T, torch.int64], *[[(3, 16, 48), (3, 48)]] * 3]),
    "pixart": (
        tiny_pixart(),
        pixart_inputs,
        [
            [X, T, (3, 7, 20), torch.bool],
            *[[(3, 16, 48), (3, 288), (3, 48), (3, 7, 48), torch.bool]] * 2,
            [(3, 16, 48), (3, 48)],
        ],
    ),
    "mmdit": (
        tiny_mmdit(pooled=12),
        lambda config: mmdit_inputs(config, lengths=[5, 2, 1]),
        [
            [X, T, (3, 5, 20), (3, 12), torch.bool],
            *[[(3, 16, 48), (3, 5, 48), (3, 48), torch.bool, torch.uint8]] * 3,
            [(3, 16, 48), (3, 48), torch.uint8],
        ],
    ),
}


@pytest.mark.parametrize("family", STAGES)
def test_every_stage_gets_and_gives_them_so(family: str) -> None:
    config, inputs, expected = STAGES[family]
    model = build_model(config)
    stage_io = model.packed_inputs(*inputs(config))
    for stage, kinds in zip(model.stages(), expected, strict=True):
        assert [tuple(v.shape) if v.is_floating_point() else v.dtype for v in stage_io] == kinds
        stage_io = stage(stage_io)
    assert [v.dim() for v in stage_io] == [4]


def test_uvit_carries_one_skip_more_a_block_and_then_one_less() -> None:
    config = tiny_uvit("text")
    model = build_model(config)
    stage_io = model.packed_inputs(*uvit_inputs(config))
    assert [v.is_floating_point() for v in stage_io] == [True, True, True, False]
    skips = []
    for stage in model.stages()[:-1]:
        stage_io = stage(stage_io)
        assert stage_io[-1].dtype == torch.bool
        skips.append(len(stage_io) - 2)
    half = config.depth // 2
    assert skips == [0, *range(half + 1), *reversed(range(half))]
