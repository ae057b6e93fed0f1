from __future__ import annotations

import pytest

from minitron_ray.core.units import CountRange
from minitron_ray.models.budget import Band
from minitron_ray.models.families.llama import FAMILY

ARCH = FAMILY.read(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
    }
)


def test_a_centre_with_a_tolerance_is_exact() -> None:
    assert Band.of(8_000_000_000, 0.05) == Band(low=7_600_000_000, high=8_400_000_000)
    # Bounds are whole numbers inside the band, without binary rounding: 100 ± 0.7 %.
    assert Band.of(100, 0.007) == Band(low=100, high=100)
    assert Band.of(1000, 0.007) == Band(low=993, high=1007)


def test_a_range_is_not_widened() -> None:
    assert Band.of(CountRange(low=5, high=9), 0.5) == Band(low=5, high=9)


@pytest.mark.parametrize(("count", "distance"), [(4, -1), (5, 0), (9, 0), (12, 3)])
def test_distance(count: int, distance: int) -> None:
    assert Band(low=5, high=9).distance(count) == distance


def test_which_count_is_meant() -> None:
    total, core = FAMILY.parameters(ARCH), FAMILY.non_embedding_parameters(ARCH)
    assert total - core == 2 * 8 * 10
    assert Band(low=total, high=total).contains(ARCH, FAMILY)
    assert not Band(low=total, high=total, count="non_embedding").contains(ARCH, FAMILY)
    assert Band(low=core, high=core, count="non_embedding").contains(ARCH, FAMILY)
    assert "non-embedding" in Band(low=core, high=core, count="non_embedding").text()
