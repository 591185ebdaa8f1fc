"""The share of replicated parameters of large models under tensor parallelism is that of docs/parallel.md."""

from __future__ import annotations

import pytest

from helpers.ranks import ROOT
from megadit.config import load_config
from megadit.models import build_model
from megadit.mup.spec import walk_slices
from megadit.parallel.tensor import TensorLayout

PERCENT = {"mmdit/18b-mup": 0.21, "pixart/target-mup": 0.06, "dit/xl-2-mup": 0.19, "uvit/l-2-mup": 0.51}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", PERCENT)
def test_the_document_tells_how_much_stays_whole(name: str, sequence: bool) -> None:
    config = load_config(str(ROOT / f"configs/{name}.yaml")).model
    total = sum(p.numel() for p in build_model(config, device="meta").parameters())
    share = build_model(config, TensorLayout(2, 0, sequence), device="meta")
    replicated = sum(p.numel() for _, p, _, shard_regions in walk_slices(share) if shard_regions is None)
    assert round(100 * replicated / total, 2) == PERCENT[name]
    assert f"{PERCENT[name]}%" in (ROOT / "docs" / "parallel.md").read_text()
