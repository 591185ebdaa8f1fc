"""Every fused kernel at once, the residual handed over between blocks, attention by lengths, the fused optimizer.

In Triton's interpreter, on tensor-parallel ranks with stages or replicas, MMDiT trains what one process does by torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.kernels.flash import CALLS, flash_on_cpu
from helpers.kernels.interpreter import need_interpreter
from helpers.layouts.matrix import gaps, matrix_config
from helpers.layouts.parity import WEIGHT_TOLERANCE
from helpers.ranks import run_ranks
from helpers.training import train_rank
from megadit.config import RunConfig
from megadit.train import run
from megadit_kernels import FUSED_KEYS, OPS_OF_KEY

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 2
TOLERANCE = 2e-5  # kernels sum in another order, and draw noise to the rounding of logarithm and sine
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor, pipeline": ({"tensor": 2, "pipeline": 2, "zero_stage": 1}, "none"),
    "tensor, sequence, ZeRO-1, selective": ({"tensor": 2, "sequence": True, "zero_stage": 1}, "selective"),
}


def config_of(
    root: Path, recompute: str = "none", *, world: int = 1, fused: bool = False, **parallel: Any
) -> RunConfig:
    """An MMDiT of two blocks on four images, two micro batches a replica; ``fused``: by all that can be fused, but for
    attention, which ``flash_on_cpu`` chooses."""
    sections = matrix_config("mmdit", root, False, recompute, world=world, **parallel).model_dump()
    sections["model"] |= {"width": 32, "depth": 2}
    sections["train"] |= {"global_batch": 4, "micro_batch": 2 if "pipeline" in parallel or world == 1 else 1}
    if fused:
        sections["kernels"] = dict.fromkeys(FUSED_KEYS, "fused") | {"residual_across_blocks": True}
        sections["optim"]["implementation"] = "fused"
    return RunConfig.model_validate(sections)


def train(config: RunConfig, folder: str) -> dict[str, Any]:
    need_interpreter()
    with pytest.MonkeyPatch.context() as monkey, flash_on_cpu("varlen"):
        monkey.setattr(run, "check_kernels", lambda *_: None)  # kernels that are asked for run in the interpreter
        result = train_rank(config, folder, STEPS)
        ran = {op.backend_on("cpu") for key in FUSED_KEYS for op in OPS_OF_KEY[key]}
        return result | {"ran": ran, "calls": [kernel for kernel, _ in CALLS]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_trains_what_it_does_by_torch(layout: str, tmp_path: Path) -> None:
    need_interpreter()
    parallel, recompute = LAYOUTS[layout]
    [expected] = run_ranks(1, train_rank, config_of(tmp_path), str(tmp_path / "alone"), STEPS)
    config = config_of(tmp_path, recompute, world=4, fused=True, **parallel)
    results = run_ranks(4, train, config, str(tmp_path / "fused"), timeout=500)
    for result in results:
        assert result["ran"] == {"fused"}
        assert result["calls"].count("forward") == result["calls"].count("backward") > 0
    measured = gaps(results, expected)
    too_large = {
        kind: gap
        for kind, gap in measured.items()
        if gap > (WEIGHT_TOLERANCE if kind in ("weights", "average") else TOLERANCE)
    }
    assert not too_large, measured
