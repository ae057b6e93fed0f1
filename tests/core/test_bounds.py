from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from minitron_ray.core.bounds import UNBOUNDED, Bounds, ByteBounds, CountBounds


def read(kind: type[Bounds], value: Any) -> Bounds:
    return TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("kind", "written", "ends"),
    [
        (CountBounds, "8B", (7_600_000_000, 8_400_000_000)),
        (CountBounds, 1000, (950, 1050)),
        (CountBounds, "8B ± 2%", (7_840_000_000, 8_160_000_000)),
        (CountBounds, "8B +- 0.02", (7_840_000_000, 8_160_000_000)),
        (CountBounds, "8B+/-2%", (7_840_000_000, 8_160_000_000)),
        (CountBounds, "7.8B..8.5B", (7_800_000_000, 8_500_000_000)),
        (CountBounds, "7..8B", (7_000_000_000, 8_000_000_000)),
        (CountBounds, "7.8 .. 8.5 B", (7_800_000_000, 8_500_000_000)),
        (CountBounds, "7_000..8_000", (7000, 8000)),
        (CountBounds, "1e9..2B", (1_000_000_000, 2_000_000_000)),
        (ByteBounds, "20..22GiB", (20 * 2**30, 22 * 2**30)),
        (ByteBounds, ".5..1.5 KiB", (512, 1536)),
        (CountBounds, "≤ 8B", (0, 8_000_000_000)),
        (CountBounds, "<=8B", (0, 8_000_000_000)),
        (CountBounds, "≥ 8B", (8_000_000_000, UNBOUNDED)),
        (ByteBounds, "<= 22GiB", (0, 22 * 2**30)),
        (ByteBounds, "20GiB..22 GiB", (20 * 2**30, 22 * 2**30)),
        (ByteBounds, "1.5KiB ± 50%", (768, 2304)),
        (ByteBounds, "<= 24GB", (0, 24 * 10**9)),
        (ByteBounds, "<= 1000", (0, 1000)),
        (ByteBounds, "22GiB", (0, 22 * 2**30)),
        (ByteBounds, 1000, (0, 1000)),
    ],
)
def test_what_is_inside(kind: type[Bounds], written: Any, ends: tuple[int, int]) -> None:
    bounds = read(kind, written)
    assert bounds.ends(0.05) == ends
    again = TypeAdapter(kind).dump_python(bounds, mode="json")
    assert read(kind, json.loads(json.dumps(again))) == bounds


def test_ends_are_whole_numbers_inside_without_binary_rounding() -> None:
    assert CountBounds(centre=100).ends(0.007) == (100, 100)
    assert CountBounds(centre=1000).ends(0.007) == (993, 1007)


def test_a_centre_alone_is_written_as_a_number() -> None:
    """As it was when nothing else could be written: the identity of such experiments stays."""
    assert TypeAdapter(CountBounds).dump_python(read(CountBounds, "90M"), mode="json") == 90_000_000


@pytest.mark.parametrize(
    ("kind", "written", "problem"),
    [
        (CountBounds, "9B..8B", r"ends below its start; write 8B\.\.9B"),
        (
            CountBounds,
            "100000..1M",
            r"read as 100000M\.\.1M, which ends below its start; give 100000 a suffix",
        ),
        (CountBounds, "7..8Q", r"found '8Q'.* in '7\.\.8Q'"),
        (CountBounds, "7B..", r"expected a count .* a range of counts"),
        (CountBounds, "1..2..3", r"expected a count .* a range of counts"),
        (CountBounds, "7B..8Q", r"found '8Q'.* in '7B\.\.8Q'"),
        (CountBounds, "90Q", r"expected a count .* or a limit \(<= 8B\), found '90Q'; suffixes are K, M, B"),
        (CountBounds, "0", "must be at least 1"),
        (CountBounds, True, "expected a count .*, found true"),
        (CountBounds, [1, 2], "expected a count"),
        (CountBounds, "8B ± 5", r"not between 0 and 1 .* did you mean 5%\?"),
        (CountBounds, "≤ 22GiB", "found '22GiB'.* in '≤ 22GiB'"),
        (ByteBounds, "22G tokens", "expected at most so many bytes .* suffixes are KiB to TiB"),
        (ByteBounds, True, "expected at most so many bytes"),
        (ByteBounds, "<= 0GiB", "must be at least 1 byte"),
        (ByteBounds, None, "expected at most so many bytes .* found nothing"),
    ],
)
def test_what_cannot_be_read(kind: type[Bounds], written: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        read(kind, written)


def test_editors_learn_both_forms() -> None:
    schema = json.dumps(TypeAdapter(ByteBounds).json_schema())
    assert '"string"' in schema and '"integer"' in schema
