"""Parameter counts of the published sizes, counted without memory."""

from __future__ import annotations

import pytest

from megadit.config import ModelConfig
from megadit.models import build_model, count_parameters


@pytest.mark.parametrize(
    ("width", "depth", "heads", "count"),
    [
        (384, 12, 6, 32_963_360),
        (768, 12, 12, 130_512_416),
        (1024, 24, 16, 458_102_816),
        (1152, 28, 16, 675_129_632),
        (144, 28, 2, 10_799_168),
        (288, 28, 4, 42_624_608),
        (576, 28, 8, 169_354_400),
    ],
)
def test_counts_of_published_sizes(width: int, depth: int, heads: int, count: int) -> None:
    config = ModelConfig(width=width, depth=depth, heads=heads)
    assert count_parameters(config) == count
    assert count_parameters(config, fixed=False) == count - 256 * width


def test_meta_model_has_no_memory() -> None:
    model = build_model(ModelConfig(width=1152, depth=28, heads=16), device="meta")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
