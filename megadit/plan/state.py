"""Bytes of a run's training state under ZeRO."""

from __future__ import annotations

_FULL = 4  # bytes of float32


def state_bytes(
    parameters: int, ranks: int, zero_stage: int, precision: str, averages: int, gradient: int | None = None
) -> dict[str, float]:
    """Bytes per rank of weights, gradients, optimizer (fp32 masters and two moments) and averages under ZeRO.

    Stage 1 shards optimizer and averages, stage 2 gradients too, stage 3 also the weights (Rajbhandari et al. 2020).
    At stage 0 in float32 the weights are their own masters. ``gradient``: bytes of an element of the gradients as they
    are added up, None for those of the weights; where these differ, a micro batch's own live until they are added.
    Activations are not counted.
    """
    working = _FULL if precision == "fp32" else 2
    masters = 0 if zero_stage == 0 and precision == "fp32" else _FULL
    held = {
        "weights": parameters * working / (ranks if zero_stage == 3 else 1),
        "gradients": parameters * (gradient or working) / (ranks if zero_stage >= 2 else 1),
        "optimizer": parameters * (2 * _FULL + masters) / (ranks if zero_stage >= 1 else 1),
    }
    if averages:
        held["averages"] = averages * parameters * _FULL / (ranks if zero_stage >= 1 else 1)
    return held
