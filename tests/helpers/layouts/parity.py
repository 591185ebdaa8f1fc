"""One training as every layout should do it, and how its results are held against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import merge_weights, plain_torch_run, small_config, train_rank
from megadit.config import RunConfig

STEPS = 5
TOLERANCE = 1e-5  # relative, float32; measured: losses 5e-8, norms 3e-7, weights 5e-6, averages 6e-6
# Of weights and their averages: Adam divides every entry's gradient by its own size, so that a sum's rounding, 6e-8 of
# its larger terms, is a part of the step of an entry whose terms cancel, and biases are still made of few steps.
# Measured with sums in another order: 2e-5. What a fault does to gradients is seen in the moments, at TOLERANCE.
WEIGHT_TOLERANCE = 1e-4
AVERAGE = "ema/0.9"
SECTIONS: dict[str, Any] = {
    "model": {"width": 64, "heads": 4, "qk_norm": "rms"},
    "ema": {"decays": (0.9,)},
}


def config_of(train: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    return small_config(parallel=parallel, train={"micro_batch": 4, "steps": STEPS, **(train or {})}, **SECTIONS)


def reference_run() -> dict[str, Any]:
    """In plain torch."""
    torch.set_num_threads(1)
    return plain_torch_run(small_config(train={"steps": STEPS}, **SECTIONS), STEPS)


def run_single_process(folder: str) -> list[dict[str, Any]]:
    """Through the library in one process: what the reference does not keep."""
    return run_ranks(1, train_rank, config_of(), folder)


def distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values - expected).norm() / expected.norm().clamp_min(1e-6))


def gap_of(name: str, values: torch.Tensor, expected: torch.Tensor) -> float:
    """``distance``; of a bias of keys, whose gradient is rounding alone, that of the others beside it."""
    if name.endswith(("qkv.bias", "kv_linear.bias")):
        parts = 3 if name.endswith("qkv.bias") else 2
        values, expected = (
            torch.cat([part for number, part in enumerate(tensor.chunk(parts)) if number != parts - 2])
            for tensor in (values, expected)
        )
    return distance(values, expected)


def assert_same_training(
    results: list[dict[str, Any]], reference: dict[str, Any], single_process: list[dict[str, Any]], skip: int = 0
) -> None:
    """Losses, norms, weights, averages and moments of all ranks; the results begin after ``skip`` steps."""
    for result in results:
        for key in ("losses", "norms"):
            torch.testing.assert_close(
                torch.tensor(result[key]), torch.tensor(reference[key][skip:]), rtol=TOLERANCE, atol=0
            )
        for norms, expected_norms in zip(result["role_norms"], reference["role_norms"][skip:], strict=True):
            assert norms == pytest.approx(expected_norms, rel=TOLERANCE)
    # The first moment is a mean of the steps' gradients, clipped.
    moments = {kind: merge_weights(single_process, kind) for kind in (AVERAGE, "exp_avg", "exp_avg_sq")}
    for kind, expected_tensors in {"pieces": reference["weights"], **moments}.items():
        within = WEIGHT_TOLERANCE if kind in ("pieces", AVERAGE) else TOLERANCE
        merged = merge_weights(results, kind)
        assert merged.keys() == expected_tensors.keys()
        for name, expected in expected_tensors.items():
            gap = distance(merged[name], expected)
            assert gap <= within, f"{kind} of {name}: {gap:.1e}"
