from __future__ import annotations

import numpy as np
import pytest

from minitron_ray.core.bounds import ByteBounds, CountBounds
from minitron_ray.models.budget import Band, Limits, Load

GIB = 2**30


def test_a_centre_with_a_tolerance_is_exact() -> None:
    assert Band.of(8_000_000_000, 0.05) == Band(low=7_600_000_000, high=8_400_000_000)
    # Bounds are whole numbers inside the band, without binary rounding: 100 ± 0.7 %.
    assert Band.of(100, 0.007) == Band(low=100, high=100)
    assert Band.of(1000, 0.007) == Band(low=993, high=1007)


def test_a_centre_with_its_own_tolerance_keeps_it() -> None:
    assert Band.of(CountBounds.parse("1000 ± 1%"), 0.5) == Band(low=990, high=1010)


def test_a_range_is_not_widened() -> None:
    assert Band.of(CountBounds(low=5, high=9), 0.5) == Band(low=5, high=9)


@pytest.mark.parametrize(
    ("count", "distance", "relative"), [(4, -1, 0.2), (5, 0, 0), (9, 0, 0), (12, 3, 1 / 3)]
)
def test_distance(count: int, distance: int, relative: float) -> None:
    band = Band(low=5, high=9)
    assert band.distance(count) == distance
    assert band.distances(np.array([count]))[0] == distance
    assert band.relative_distance(count) == pytest.approx(relative)


def test_bands_in_words() -> None:
    memory = Band.of(ByteBounds.parse("<= 22GiB"), measure="memory_bytes")
    flops = Band.of(CountBounds.parse("≥ 1B"), measure="flops_per_token")
    assert memory.text() == "at most 22.0 GiB of memory"
    assert flops.text() == "at least 1.000B FLOPs a token"
    assert memory.outside(GIB) == "1.0 GiB of memory above the budget"
    assert flops.outside(-10_000_000) == "10.0M FLOPs a token below the budget"
    core = Band(low=5, high=9, measure="non_embedding_parameters")
    assert core.text() == "5 to 9 non-embedding parameters"
    load = Load(batch=8, length=4096)
    both = Limits(bands=(core, memory), load=load)
    assert both.text() == f"{core.text()}, {memory.text()} (8 x 4096 tokens in bfloat16)"
    assert Limits.on(core).text() == core.text()


def test_violations_of_all_bands_add_up() -> None:
    limits = Limits.on(
        Band(low=80, high=100), Band(low=0, high=1000, measure="memory_bytes"), load=Load(length=8)
    )
    assert limits.violation({"parameters": 90, "memory_bytes": 1000}) == 0
    assert limits.violation({"parameters": 40, "memory_bytes": 1100}) == pytest.approx(0.5 + 0.1)
